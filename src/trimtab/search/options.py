"""What a sublayer may become. An option is a recipe for one sublayer; the search decides which sublayer takes which."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from trimtab.core.spec import Pass, parse
from trimtab.core.types import BadInput

DENSE, DROP, HEAD = "dense", "drop", "head"
ATTN, MLP = "attn", "mlp"
FORMATS = ("ours", "plain", "gguf", "compressed-tensors")  # what the target runtime opens
CODES = {8: "int(bits=8,group=128)", 4: "int(bits=4,group=128)", 3: "int(asymmetric=true,bits=3,clip=mse,group=64)",
         2: "int(asymmetric=true,bits=2,clip=mse,group=64)"}


@dataclass(frozen=True)
class Whole:
    """What is chosen once, for all codes that are made by what they cost: the rewrite before them and the repair behind; "" is none."""

    rewrite: str = ""
    repair: str = ""

    def __str__(self) -> str:
        return "-".join(w for w in (self.rewrite, self.repair) if w) or "plain"

    def around(self, text: str) -> str:
        """The passes of an option with these in."""
        return " ; ".join(" | ".join(w for w in (self.rewrite, p, self.repair) if w) if "| gptq" in p else p for p in text.split(" ; "))


PLAIN = Whole()
WHOLES = (PLAIN, Whole("awq", "gain"), Whole("", "gain"), Whole("awq", ""))


@dataclass(frozen=True)
class Option:
    """`text`: the passes, without their scope ("" leaves the sublayer as it is). `like`: the same layout and shapes, quickly made: what is
    timed in place of it where what the weights are says nothing of the time. `family`: of which methods it is. `formats`: who opens it.
    `plain`: the name of the same with no rewrite and no repair."""

    name: str
    family: str
    groups: tuple[str, ...]
    text: str
    like: str
    label: str
    formats: tuple[str, ...] = ("ours",)
    whole: Whole = PLAIN
    plain: str = ""

    @cached_property
    def passes(self) -> tuple[Pass, ...]:
        return parse(self.text).passes if self.text else ()

    @cached_property
    def quickly(self) -> tuple[Pass, ...]:
        return parse(self.like).passes if self.like else ()


def _options() -> list[Option]:
    both = (ATTN, MLP)
    found = [Option(DENSE, "dense", both, "", "", "as it is, in bfloat16", FORMATS)]
    for bits, edit in ((8, "rtn"), (4, "gptq"), (3, "gptq"), (2, "gptq")):
        opens = ("ours", "gguf", "compressed-tensors") if bits == 8 else ("ours", "compressed-tensors") if bits == 4 else ("ours",)
        found.append(Option(f"int{bits}", "quantise", both, f"{CODES[bits]} | {edit}", f"{CODES[bits]} | rtn",
                            f"{bits}-bit codes", opens))
    pattern = "nm(m=4,n=2) | sparsegpt"
    quick = "nm(m=4,n=2) | magnitude"
    found += [Option("2:4", "sparse", both, pattern, quick, "2:4 zeros"),
              Option("2:4-int4", "mixed", both, f"{pattern} ; {CODES[4]} | gptq", f"{quick} ; {CODES[4]} | rtn", "2:4 zeros, 4-bit codes")]
    for keep in (0.5, 0.85, 0.7, 0.25, 0.95, 0.6, 0.35):  # what is made first first
        name, text = f"neurons{100 * keep:.0f}", f"neuron(keep={keep:g})"
        found += _smaller(name, "width", MLP, f"{text} | wanda | mask | least_squares", f"{text} | magnitude",
                          f"{100 * keep:.0f} % of its neurons")
    found += _smaller("heads50", "width", ATTN, "kvgroup(keep=0.5) | wanda | mask | least_squares", "kvgroup(keep=0.5) | magnitude",
                      "half of its heads")
    for keep in (0.3, 0.1):
        found.append(Option(f"blocks{100 * keep:.0f}", "sparse", (MLP,), f"block(b=32,keep={keep:g}) | wanda | mask | least_squares",
                            f"block(b=32,keep={keep:g}) | magnitude", f"{100 * keep:.0f} % of its 32x32 blocks"))
    for keep in (0.5, 0.3):
        found.append(Option(f"rank{100 * keep:.0f}", "low rank", both, f"svdllm(keep={keep:g})", f"svd(keep={keep:g})",
                            f"factors with {100 * keep:.0f} % of its parameters"))
    for keep in (0.5, 0.3):
        gate = f"gate_magnitude(keep={keep:g})"
        found += [Option(f"gate{100 * keep:.0f}", "gates", both, gate, gate, f"{100 * keep:.0f} % of its inputs computed"),
                  Option(f"int4-gate{100 * keep:.0f}", "mixed", both, f"{CODES[4]} | gptq ; {gate}", f"{CODES[4]} | rtn ; {gate}",
                         f"4-bit codes, {100 * keep:.0f} % of its inputs computed")]
    found.append(Option(DROP, "depth", both, "sublayer(keep=0.001) | magnitude", "sublayer(keep=0.001) | magnitude", "dropped",
                        ("ours", "plain", "gguf")))
    coded = [o for o in found if "gptq" in o.text and "gate" not in o.text]  # gates choose inputs by sizes that a rewrite would change
    found += [replace(o, name=f"{o.name}-{w}", text=w.around(o.text), label=f"{o.label}, {str(w).replace('-', ' and ')}", whole=w,
                      plain=o.name) for w in WHOLES if w != PLAIN for o in coded]
    return found


def _smaller(name: str, family: str, group: str, text: str, like: str, label: str) -> list[Option]:
    plain = Option(name, family, (group,), text, like, label, ("ours", "plain"))
    return [plain, *(replace(plain, name=f"{name}-int{bits}", family="mixed", text=f"{text} ; {CODES[bits]} | {edit}",
                             like=f"{like} ; {CODES[bits]} | rtn", label=f"{label}, {bits}-bit codes",
                             formats=("ours", "compressed-tensors"))
                     for bits, edit in ((8, "rtn"), (4, "gptq")))]


OPTIONS = {o.name: o for o in _options()}
MADE = {(o.plain, o.whole): o.name for o in OPTIONS.values() if o.plain}  # what an option is called where that is chosen
FAMILIES = tuple(dict.fromkeys(o.family for o in OPTIONS.values() if o.name != DENSE))


def opened_by(runtime: str) -> list[Option]:
    """The options that a runtime opens, as they are where nothing is chosen for the whole network."""
    if runtime not in FORMATS:
        raise BadInput(f"--formats {runtime!r} is not one of {', '.join(FORMATS)}")
    return [o for o in OPTIONS.values() if runtime in o.formats and o.whole == PLAIN]


def of_family(names: Iterable[str], family: str) -> list[str]:
    """Those of one family of methods, and what leaves a sublayer as it is."""
    return [n for n in names if OPTIONS[n].family in (family, "dense")]
