"""Recipes: the string a user types <-> steps. Rows are recipes with a paper's name.

    row | wanda | owl(outlier=5) | mask | admm | bitmask        one pass, spelled out
    mlp: nm(n=2,m=4) | wanda ; attn: sparsegpt(keep=0.7)         two passes, each with its scope
    knapsack(mean=3.2) | int(bits=2/3/4,group=64) | gptq         one of three grids for every site, as the budget chooses
    attn: sublayer | influence ; fusion                          what takes parts away, then what rewires the rest: a step by itself
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from trimtab.core.registry import AXES, Method, get, load_all, near
from trimtab.core.types import BadInput, Claim, Site

# The order in which a pipeline is written.
LINE = ("wiring", "unit", "score", "budget", "rewrite", "grid", "gate", "edit", "repair", "input", "format")
DEFAULTS = {"unit": "unit/row", "budget": "budget/uniform", "edit": "edit/mask"}
PASS_KNOBS = ("keep", "order")  # belong to the whole pass, wherever they are written
ORDERS = ("sequential", "dense")
SCOPES = ("all", "attn", "mlp")


@dataclass(frozen=True)
class Step:
    key: str
    knobs: tuple[tuple[str, Any], ...] = ()

    @property
    def method(self) -> Method:
        return get(self.key)

    @property
    def bound(self) -> dict[str, Any]:
        """All knobs with their values, defaults filled in."""
        return {**self.method.knobs, **dict(self.knobs)}

    @property
    def options(self) -> list[Step]:
        """With each of the values that a knob may take; itself where no knob has several."""
        each = [[(k, one) for one in v] if isinstance(v, tuple) else [(k, v)] for k, v in self.knobs]
        return [Step(self.key, knobs) for knobs in product(*each)]

    def __str__(self) -> str:
        args = ",".join(f"{k}={'/'.join(map(_said, v)) if isinstance(v, tuple) else _said(v)}" for k, v in self.knobs)
        return f"{self.key}({args})" if args else self.key


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Pass:
    steps: dict[str, Step]  # by axis, but for repairs, which stand by their keys, in order
    scope: str | None = None
    keep: float | None = None
    order: str = "sequential"

    @property
    def free(self) -> bool:
        """Whether the share kept is the user's to choose."""
        if "unit" in self.steps:
            return bool(self.steps["unit"].method.facts["free"]) and self.takes != "network" and not self.owns
        if self.wiring is not None:
            return "keep" in self.wiring.method.data
        edit = self.steps["edit"]
        factors = bool(edit.method.facts["factors"]) and not any(edit.bound.get(k) for k in ("rank", "energy"))
        return self.gates or bool(self.ties) or factors

    @property
    def gates(self) -> bool:
        """Whether it decides which inputs of a token are computed, and leaves the weights."""
        return "edit" in self.steps and bool(self.steps["edit"].method.facts["gates"])

    @property
    def ties(self) -> str:
        """What takes the weights of another, if that is what it does: a "layer" or a "head"."""
        return str(self.steps["edit"].method.facts["shares"]) if "edit" in self.steps else ""

    @property
    def pairs(self) -> bool:
        """Whether who takes whose is tried on calibration text."""
        return bool(self.ties and self.steps["edit"].bound.get("tried"))

    @property
    def folds(self) -> bool:
        """Whether what makes an input takes a part of it."""
        return "rewrite" in self.steps and not self.steps["rewrite"].method.facts["basis"]

    @property
    def centres(self) -> Callable[[Any], Any] | None:
        """Of a sample of an input [tokens, in], what is taken off it before it is scaled."""
        if not self.folds or (of := self.steps["rewrite"].method.facts["centre"]) is None:
            return None
        return lambda x: of(x, self.steps["rewrite"].bound)

    @property
    def turns(self) -> bool:
        """Whether sites are edited in a basis that stays with them."""
        return "rewrite" in self.steps and bool(self.steps["rewrite"].method.facts["basis"])

    @property
    def shares(self) -> bool:
        """Whether that basis is one that its neighbours have too."""
        return self.turns and self.steps["rewrite"].method.facts["shared"] is not None

    @property
    def chooses(self) -> bool:
        """Whether its budget chooses a grid for every site."""
        return "budget" in self.steps and bool(self.steps["budget"].method.facts["chooses"])

    @property
    def repairs(self) -> list[Step]:
        """One after the other, each of what the one before it made."""
        return [s for s in self.steps.values() if s.method.axis == "repair"]

    @property
    def trainer(self) -> Step | None:
        """The repair of the whole network, if it has one: a stage of its own, behind what it edits."""
        return next((r for r in self.repairs if r.method.facts["level"] == "net"), None)

    @property
    def stages(self) -> list[Pass]:
        """What it does block by block, and then the pass itself where it trains."""
        before = {k: s for k, s in self.steps.items() if s is not self.trainer}
        return [replace(self, steps=before), self] if self.trainer else [self]

    @property
    def options(self) -> list[Pass]:
        """With each of the grids that a site may take; itself where there is nothing to choose."""
        return [replace(self, steps={**self.steps, "grid": g}) for g in self.steps["grid"].options] if self.chooses else [self]

    def chosen(self, option: float | str | None) -> Pass:
        """With the grid of this name, where it chooses one; what else the plan says is a share, or a place."""
        return replace(self, steps={**self.steps, "grid": grid_step(option)}) if self.chooses and isinstance(option, str) else self

    @property
    def working(self) -> set[str]:
        """Statistics that sites are edited by, once the plan is made."""
        named = {n for axis, s in self.steps.items() if axis != "budget" and not (self.ties and axis == "score") for n in s.method.needs}
        if self.takes == "channel" and self.steps["unit"].bound["scaled"]:
            named |= {"stream_sq"}
        if named and self.turns:
            named |= {"gram"}  # which tells the others in another basis
        if self.centres:
            named |= {"sample", "in_mean"}  # which tell the others of inputs that moved
        return named

    @property
    def needs(self) -> set[str]:
        return self.working | self.planned

    @property
    def planned(self) -> set[str]:
        """What only its budget wants to know, or the plan for it."""
        return set(self.budget.method.needs) | ({"grad_sq"} if self.chooses and not self.measures else set()) | (
            {"gram", "grad_sq"} if self.ranks else set()) | (set(self.steps["score"].method.needs) if self.ties and "score" in self.steps
                                                             else set())

    @property
    def ranks(self) -> bool:
        """Whether its budget chooses the ranks of factors."""
        return bool(self.budget.method.facts["spectra"])

    @property
    def learns(self) -> bool:
        """Whether its budget chooses the ranks of factors by a ranking that is trained, or was by an earlier run."""
        return self.budget.method.facts["learns"] is not None

    @property
    def trains(self) -> bool:
        """Whether that is trained."""
        return self.learns and not self.budget.bound["source"]

    @property
    def tries(self) -> bool:
        """Whether its budget tries the shares of its gates on every block."""
        return "trial" in self.budget.method.data

    @property
    def owns(self) -> bool:
        """Whether its budget says what stays, and no share is asked for."""
        return bool(self.budget.method.facts["own"])

    @property
    def measures(self) -> bool:
        """Whether what its budget chooses from is tried on the network."""
        return self.chooses and self.budget.method.facts["chooses"] == "trials"

    @property
    def looks(self) -> bool:
        """Whether what is rewired is tried on the network."""
        return self.wiring is not None and (looks := self.wiring.method.facts["looks"]) is not None and bool(looks(self.wiring.bound))

    @property
    def budget(self) -> Step:
        """The budget, also where the unit decides it (one threshold for the model is the global budget)."""
        return self.steps.get("budget", Step("budget/global" if "unit" in self.steps else "budget/uniform"))

    @property
    def ends(self) -> tuple[str, ...]:
        """Where it takes parts of the network away, the roles of the sites whose inputs they are; else none."""
        return self.steps["unit"].method.facts["ends"] if "unit" in self.steps else ()

    @property
    def takes(self) -> str:
        """Whether it takes all of a sublayer or of a layer, or parts of all of them: what the unit says, or ""."""
        return str(self.steps["unit"].method.facts["takes"]) if self.ends else ""

    @property
    def wiring(self) -> Step | None:
        """What it does to the network as a whole, where that is no matter of sites: then it has no other step."""
        return self.steps.get("wiring")

    @property
    def shapes(self) -> bool:
        """Whether it changes the shape of the network."""
        return bool(self.ends) or self.wiring is not None

    @property
    def alone(self) -> bool:
        """Whether it is of every layer at once, with no site's inputs masked for it."""
        return self.takes in ("channel", "network") or self.wiring is not None

    def covers(self, site: Site) -> bool:
        return self.wiring is None and self.spans(site) and (not self.ends or site.role in self.ends)

    def spans(self, site: Site) -> bool:
        """Whether its scope names the site."""
        def matches(scope: str) -> bool:
            if scope.startswith("!"):
                return not matches(scope[1:])
            return scope in ("all", site.group) or (scope not in SCOPES and bool(re.fullmatch(_glob(scope), site.name)))

        return all(any(map(matches, part.split(","))) for part in (self.scope or "all").split("&"))

    def __str__(self) -> str:
        parts = [str(s) for a in LINE for s in self.steps.values() if s.method.axis == a]
        knobs = [f"keep={self.keep}"] * (self.keep is not None) + [f"order={self.order}"] * (self.order != "sequential")
        if knobs:
            head = parts[0]
            parts[0] = f"{head[:-1]},{','.join(knobs)})" if head.endswith(")") else f"{head}({','.join(knobs)})"
        return (f"{self.scope}: " if self.scope else "") + " | ".join(parts)


def _glob(pattern: str) -> str:
    return "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)


@dataclass(frozen=True)
class Recipe:
    name: str
    passes: tuple[Pass, ...]
    source: str = ""
    claims: tuple[Claim, ...] = ()
    note: str = ""
    row: str = field(default="", compare=False)  # how the row was written

    @property
    def text(self) -> str:
        """The pipeline spelled out; parses back to the same passes."""
        return " ; ".join(map(str, self.passes)) or "dense"

    @property
    def structure(self) -> tuple[Pass, ...]:
        """Its first passes, which take parts of the network away or rewire it."""
        return tuple(p for p in self.passes if p.shapes)

    @property
    def options(self) -> list[Recipe]:
        """With each of the grids that the sites of its passes may take; itself where there is nothing to choose."""
        return [replace(self, passes=each) for each in product(*(p.options for p in self.passes))]

    @property
    def needs(self) -> set[str]:
        return {n for p in self.passes for n in p.needs}

    @property
    def calibrated(self) -> bool:
        """Whether it sees calibration samples."""
        return bool(self.needs) or any(p.trainer or p.trains or p.measures or p.tries or p.looks or p.pairs for p in self.passes)

    @property
    def methods(self) -> dict[str, str]:
        """Version of every method it uses, statistics included."""
        keys = {s.key for p in self.passes for s in p.steps.values()} | {f"stat/{n}" for n in self.needs}
        keys |= {p.budget.key for p in self.passes if "unit" in p.steps}
        return {k: get(k).version for k in sorted(keys)}

    def seeded(self, seed: int) -> Recipe:
        """With --seed handed to every step that draws and was given no seed of its own."""
        def with_seed(s: Step) -> Step:
            if seed and "seed" in s.method.knobs and "seed" not in dict(s.knobs):
                return Step(s.key, tuple(sorted((*s.knobs, ("seed", seed)))))
            return s

        return replace(self, passes=tuple(replace(p, steps={a: with_seed(s) for a, s in p.steps.items()}) for p in self.passes))

    def limited(self, scope: str | None, keep: float | None) -> Recipe:
        """With the command line's --scope and --keep; either given twice is refused."""
        passes = list(self.passes)
        if scope is not None:
            check_scope(scope)
            if any(p.scope for p in passes) and not self.row:
                raise BadInput("--scope is given, but the recipe names its own scope: use one of the two")
            passes = [replace(p, scope=f"{scope}&{p.scope}" if p.scope else scope) for p in passes]
        if keep is not None:
            check_keep(keep, "--keep")
            if any(p.keep is not None for p in passes):
                raise BadInput("--keep is given, but the recipe names its own keep: use one of the two")
            if not any(p.free for p in passes):
                raise BadInput(f"--keep is given, but {self.name!r} fixes its own share (n:m, bits, rank, energy): leave --keep out")
            passes = [replace(p, keep=keep) if p.free else p for p in passes]
        return replace(self, passes=tuple(passes))


RECIPES: dict[str, Recipe] = {}


def recipe(name: str, text: str, *, source: str, claims: Sequence[Claim] = (), note: str = "") -> None:
    """Declare a row: a paper's short name for a pipeline."""
    if name in RECIPES:
        raise ValueError(f"recipe {name!r} declared twice")
    RECIPES[name] = replace(parse(text), name=name, source=source, claims=tuple(claims), note=note, row=text)


def rows() -> dict[str, Recipe]:
    """All rows, methods and recipes loaded."""
    import trimtab.recipes  # noqa: F401  (declares them)

    return RECIPES


def check_keep(keep: float, name: str = "keep") -> float:
    if not 0 < keep <= 1:
        raise BadInput(f"{name} is {keep:g}; a share kept is above 0 and at most 1, such as 0.5 or 50%")
    return keep


def check_scope(scope: str) -> str:
    for part in (p.removeprefix("!") for p in re.split("[,&]", scope)):
        if part in ("head", "embed"):
            raise BadInput(f"scope {part!r} is not supported yet; use attn, mlp, all or a glob of site names such as '*.down'")
        if part not in SCOPES and not re.search(r"[.*?]", part):
            raise BadInput(f"unknown scope {part!r}; use attn, mlp, all or a glob of site names such as '*.down'")
    return scope


def load(text: str) -> Recipe:
    """A recipe from what the user typed: a row's name, a pipeline, or a YAML file of the same."""
    path = Path(text)
    if text.endswith((".yaml", ".yml")):
        if not path.is_file():
            raise BadInput(f"no recipe file {text!r}")
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{text} is not UTF-8 text") from None
        return from_yaml(source, text)
    rows()
    return parse(text)


def from_yaml(source: str, where: str = "recipe") -> Recipe:
    import yaml

    rows()
    try:
        data = yaml.safe_load(source)
    except yaml.YAMLError as e:
        raise BadInput(f"{where} is not YAML: {str(e).splitlines()[0]}") from None
    if isinstance(data, str):
        return parse(data)
    if not isinstance(data, dict) or not isinstance(data.get("recipe"), str):
        raise BadInput(f"{where}: expected a mapping with `recipe:` and a pipeline, such as recipe: \"row | wanda\"")
    if odd := set(data) - {"recipe", "keep", "scope"}:
        raise BadInput(f"{where}: unknown entries {sorted(odd)}; known: recipe, keep, scope")
    keep, scope = data.get("keep"), data.get("scope")
    keep = _value(str(keep)) if keep is not None else None
    if keep is not None and not isinstance(keep, (int, float)):
        raise BadInput(f"{where}: keep: {data['keep']} is not a share; use 0.5 or 50%")
    return parse(data["recipe"]).limited(None if scope is None else str(scope), None if keep is None else float(keep))


def parse(text: str) -> Recipe:
    """A pipeline, rows allowed as whole passes. Anything contradictory or unknown is BadInput."""
    load_all()
    if not text.strip():
        raise BadInput("the recipe is empty; try wanda, or see `trimtab catalogue`")
    if text.strip() == "dense":
        return Recipe("dense", ())
    name, found, passes = text.strip(), None, []
    parts = _split(text, ";")
    for part in parts:
        scope, body = _scope(part)
        tokens = [_token(t) for t in _split(body, "|")]
        if len(tokens) == 1 and tokens[0][0] in RECIPES:
            row = RECIPES[tokens[0][0]]
            found = None if scope else row
            new = _row(row, tokens[0][1])
            if scope and any(p.scope for p in new):
                raise BadInput(f"{row.name!r} names its own scopes; leave {scope!r} out")
            passes += [replace(p, scope=scope) if scope else p for p in new]
        else:
            passes.append(_pipeline(tokens, scope))
    first = next((i for i, p in enumerate(passes) if not p.shapes), len(passes))
    if late := [p for p in passes[first:] if p.shapes]:
        name = next(iter(late[0].steps.values())).method.name
        raise BadInput(f"{name} changes the shape of the network; put it in front of {passes[first]}")
    if found and len(parts) == 1:
        return replace(found, name=name, passes=tuple(passes), claims=())
    return Recipe(name, tuple(passes))


def _split(text: str, sep: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth < 0:
            raise BadInput(f"unbalanced ')' in {text.strip()!r}")
        if c == sep and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth:
        raise BadInput(f"unbalanced '(' in {text.strip()!r}")
    return [*parts, text[start:]]


def _scope(part: str) -> tuple[str | None, str]:
    m = re.match(r"\s*([^\s|():]+)\s*:(.*)$", part, re.S)
    return (check_scope(m[1]), m[2]) if m else (None, part)


def _token(text: str) -> tuple[str, dict[str, Any]]:
    m = re.fullmatch(r"\s*([a-z_]\w*(?:/[a-z_]\w*)?)\s*(?:\((.*)\))?\s*", text, re.S)
    if not m:
        raise BadInput(f"cannot read {text.strip()!r}; a step is name or name(knob=value,...)")
    knobs: dict[str, Any] = {}
    for arg in _split(m[2], ",") if (m[2] or "").strip() else []:
        k = re.fullmatch(r"\s*(\w+)\s*=\s*(.+?)\s*", arg, re.S)
        if not k:
            raise BadInput(f"cannot read {arg.strip()!r} in {text.strip()!r}; a knob is name=value")
        if k[1] in knobs:
            raise BadInput(f"{k[1]} is given twice in {text.strip()!r}")
        knobs[k[1]] = _value(k[2])
    return m[1], knobs


def _value(text: str) -> Any:
    text = text.strip("'\"")
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?%?", text, re.I):
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    return {"true": True, "false": False}.get(text, text)


def _step(m: Method, knobs: dict[str, Any]) -> Step:
    out = {}
    for k, v in knobs.items():
        if k not in m.knobs:
            known = list(m.knobs)
            if k in ("unit", "grid"):
                raise BadInput(f"{k}= belongs to a row that stands alone; in a pipeline the {k} is a step, such as '{v} | {m.name}'")
            raise BadInput(f"{m.name} has no knob {k!r}{near(k, known) if known else '; it has none'}")
        if m.axis == "grid" and isinstance(v, str) and "/" in v:
            v = tuple(map(_value, v.split("/")))
            if len(set(v)) < len(v):
                raise BadInput(f"{m.name}: {k}={'/'.join(map(_said, v))} names a value twice")
        out[k] = tuple(_typed(m, k, one) for one in v) if isinstance(v, tuple) else _typed(m, k, v)
    return Step(m.key, tuple(sorted(out.items())))


def _typed(m: Method, k: str, v: Any) -> Any:
    want = type(m.knobs[k])
    if want is float and isinstance(v, int) and not isinstance(v, bool):
        v = float(v)
    if type(v) is not want:
        raise BadInput(f"{m.name}: {k}={v} should be of type {want.__name__}, such as {m.knobs[k]}")
    return v


def _pop_pass_knobs(knobs: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    got = {k: knobs.pop(k) for k in PASS_KNOBS if k in knobs and k not in own}
    if "keep" in got:
        if not isinstance(got["keep"], (int, float)):
            raise BadInput(f"keep={got['keep']} is not a share; use 0.5 or 50%")
        got["keep"] = check_keep(float(got["keep"]))
    if got.get("order", "dense") not in ORDERS:
        raise BadInput(f"order={got['order']} is unknown; use sequential or dense")
    return got


def _place(m: Method) -> str:
    """Where it stands among the steps of a pass, of which it has one but for repairs."""
    return m.key if m.axis == "repair" else m.axis


def _free(m: Method) -> tuple[str, ...]:
    """What nobody may have decided before it: its place, and for a repair of the weights that they are mended at all."""
    return (_place(m),) if "bias" in m.facts.get("leaves", ()) else (m.axis, _place(m))


def _pipeline(tokens: list[tuple[str, dict[str, Any]]], scope: str | None) -> Pass:
    reg = load_all()
    steps: dict[str, Step] = {}
    decided: dict[str, str] = {}  # axis -> who decided it
    own: dict[str, Any] = {}
    for name, knobs in tokens:
        named = [m for m in reg.values() if name in (m.key, m.name) and m.axis in LINE]
        if not named:
            known = [m.name for m in reg.values() if m.axis in LINE] + list(RECIPES)
            hint = "; a row is a whole pass, it cannot stand inside a pipeline" if name in RECIPES else near(name, known)
            raise BadInput(f"unknown method {name!r}{hint}")
        # what rounds to a grid decides a share of its own, and leaves it to a budget which grid that is
        left = {"budget"} if "budget" in steps and steps["budget"].method.facts["chooses"] else set()
        open_ = [m for m in named if not {*_free(m), *(set(m.joint) - left)} & set(decided)]
        if not decided.keys() - {"unit", "budget"}:  # a repair or a format is named after what it acts on
            open_ = [m for m in open_ if m.axis not in ("repair", "format")] or open_
        if not open_:
            axis = next(a for a in (*_free(named[-1]), *named[-1].joint) if a in decided)
            raise BadInput(f"{decided[axis]!r} and {name!r} both decide {axis}; keep one of them")
        if len(open_) > 1:
            raise BadInput(f"{name!r} is ambiguous; write {' or '.join(m.key for m in open_)}")
        m = open_[0]
        if m.axis == "wiring" and len(tokens) > 1:
            raise BadInput(f"{name} rewires the network as a whole and is a pass by itself; write it so: {name} ; ...")
        for k, v in _pop_pass_knobs(knobs, m.knobs).items():
            if own.setdefault(k, v) != v:
                raise BadInput(f"{k} is given twice in one pass")
        steps[_place(m)] = _step(m, knobs)
        decided |= dict.fromkeys((_place(m), *m.joint), name)
    if "wiring" in steps:
        return _checked(Pass(steps, scope, own.get("keep"), own.get("order", "sequential")))
    if "grid" in decided and "edit" not in decided:  # what rounds to it, unless something else is asked for
        steps["edit"] = Step("edit/rtn")
        decided |= dict.fromkeys(("edit", *get("edit/rtn").joint), "rtn")
    if "gate" in decided and "edit" not in decided:
        steps["edit"] = Step("edit/gated")
        decided |= dict.fromkeys(("edit", *get("edit/gated").joint), decided["gate"])
    if "edit" in steps and "gate" in steps["edit"].method.data and "gate" not in decided:
        steps["gate"] = Step("gate/gate_magnitude")
        decided["gate"] = "gate_magnitude"
    if "edit" in steps and "grid" in steps["edit"].method.data and "grid" not in decided:
        steps["grid"] = Step("grid/int")
        decided["grid"] = "int"
    for axis, key in DEFAULTS.items():
        if axis not in decided:
            steps[axis] = Step(key)
            decided |= dict.fromkeys((axis, *get(key).joint), key)
    if "score" not in decided and not steps["edit"].method.facts["shares"]:
        raise BadInput(f"no score is named in {' | '.join(n for n, _ in tokens)!r}; add one, such as magnitude or wanda")
    ordered = {k: s for a in AXES for k, s in steps.items() if s.method.axis == a}
    return _checked(Pass(ordered, scope, own.get("keep"), own.get("order", "sequential")))


def _checked(p: Pass) -> Pass:
    if p.wiring is not None:
        if (p.keep is not None and not p.free) or p.order != "sequential":
            raise BadInput(f"{p.wiring} has {'no order; leave it' if p.free else 'neither keep nor order; leave them'} out")
        return p
    edit = p.steps["edit"].method
    if "gate" in p.steps and not p.gates:
        raise BadInput(f"{p.steps['gate']} leaves the weights to other passes, and {edit.name} changes them; put it behind, in a pass of "
                       f"its own: {edit.name} ; {p.steps['gate'].method.name}")
    if p.gates and (others := [s for s in p.steps.values() if s.method.axis not in ("gate", "edit", "budget")]):
        raise BadInput(f"{p.steps['gate']} leaves the weights to other passes; put {others[0]} in a pass of its own before it")
    if p.gates and not p.tries and p.budget.key != "budget/uniform":
        raise BadInput(f"{p.budget} splits what is dropped of weights, and {p.steps['gate']} drops none; leave it out, or split what is "
                       f"computed by {' or '.join(m.name for m in load_all().values() if m.axis == 'budget' and 'trial' in m.data)}")
    if p.tries and not p.gates:
        raise BadInput(f"{p.budget} splits what gates compute, and {edit.name} is none; name a gate, such as {p.budget.method.name} | "
                       "gate_magnitude, or another budget, such as owl")
    if p.ends and (others := [s for s in p.steps.values() if s.method.axis in ("rewrite", "grid", "gate", "input", "format")]):
        raise BadInput(f"{p.steps['unit'].method.name} takes a part of the network with all its weights; put {others[0]} in a pass of its "
                       "own behind it")
    if edit.facts["fuses"] and (p.steps["unit"].key != "unit/neuron" if "unit" in p.steps else True):
        raise BadInput(f"{edit.name} makes hidden neurons one; put neuron in front of it: neuron | {edit.name}")
    if p.ends and edit.key != "edit/mask" and not edit.facts["fuses"]:
        raise BadInput(f"{p.steps['unit'].method.name} takes a part of the network as a whole, and {edit.name} decides about single "
                       "weights; name a score, such as wanda, and a repair, such as least_squares")
    if p.ties and (others := [s for s in p.steps.values() if s.method.axis in ("rewrite", "grid", "gate", "repair", "input")]):
        raise BadInput(f"{edit.name} leaves weights that another place has, and {others[0]} would make others of them; put it in a pass of "
                       "its own")
    if p.ties and "score" in p.steps and (p.ties != "layer" or p.steps["score"].method.facts["of"] != "sublayer"):
        fits = [m.name for m in load_all().values() if m.axis == "score" and m.facts["of"] == "sublayer"]
        raise BadInput(f"{p.steps['score'].method.name} does not say which {p.ties} goes; " + (
            f"use {', '.join(fits)}" if p.ties == "layer" else f"leave it out, {edit.name} pairs them by their weights"))
    if p.takes in ("channel", "network") and p.repairs:
        raise BadInput(f"{p.repairs[0]} mends a map whose outputs stay, and {p.steps['unit'].method.name} leaves none; leave it out")
    if (of := p.steps["score"].method.facts["of"] if "score" in p.steps and not p.ties else "weight") != "weight":
        unit = p.steps["unit"]
        if (of == "sublayer" and p.takes not in ("sublayer", "layer")) or not unit.method.facts["whole"]:
            fits = [m.name for m in load_all().values() if m.axis == "unit" and m.facts["whole"]
                    and (m.facts["takes"] in ("sublayer", "layer") or (of == "input" and "score" not in m.joint))]
            raise BadInput(f"{p.steps['score'].method.name} says what an {of} is worth, and {unit.method.name} is another unit; use "
                           f"{', '.join(fits)}".replace("an sublayer", "a sublayer"))
    if p.owns and not (p.ends and not p.takes):
        raise BadInput(f"{p.budget} says which parts of the network stay, and {p.steps.get('unit', edit)} are none that are told apart; "
                       "put neuron, head, kvgroup or inner in front of it")
    if (p.ranks or p.learns) and not (p.free and edit.facts["factors"]):
        raise BadInput(f"{p.budget} chooses the ranks of factors, and {p.steps['edit']} " + (
            "fixes its own; leave one of the two out" if edit.facts["factors"] else "leaves none; name some that does, such as svdllm"))
    if "grid" in p.steps and "grid" not in edit.data:
        raise BadInput(f"{edit.name} rounds to no grid, and {p.steps['grid']} is named; add rtn or gptq, in a pass of its own")
    if "rewrite" in p.steps and "grid" in p.steps["rewrite"].method.data and "grid" not in p.steps:
        raise BadInput(f"{p.steps['rewrite']} wants a grid to try its scales on; name one, such as int, with rtn or gptq")
    several = "grid" in p.steps and len(p.steps["grid"].options) > 1
    if several and not p.chooses:
        raise BadInput(f"{p.steps['grid']} names several grids; put what chooses one in front, such as knapsack(mean=3)")
    if p.chooses and not several:
        raise BadInput(f"{p.steps['budget']} chooses one of several grids; name them, such as int(bits=2/3/4), with rtn or gptq behind")
    if "rewrite" in p.steps and p.steps["rewrite"].method.facts["rounded"] and "input" not in p.steps:
        raise BadInput(f"{p.steps['rewrite']} is made for inputs that are rounded; say how, such as token or static")
    if "input" in p.steps and not edit.facts["codes"]:
        raise BadInput(f"{p.steps['input']} rounds inputs where they meet codes, and {edit.name} leaves none; "
                       "round the weights with rtn or gptq")
    if "input" in p.steps and edit.facts["either"]:
        raise BadInput(f"{edit.name} may put its groups along the outputs, which no rounded input meets; "
                       f"use rtn or gptq with {p.steps['input']}")
    leaves = {k: edit.name for k in ("codes", "factors", "books") if edit.facts[k]}
    for r in p.repairs:
        if lost := {k: who for k, who in leaves.items() if k not in r.method.facts["keeps"]}:
            keep = [m.name for m in load_all().values() if m.axis == "repair" and set(leaves) <= set(m.facts["keeps"])]
            who = next(iter(lost.values()))
            raise BadInput(f"{r} would leave the {' and '.join(lost)} of {who}" + (
                f"; put it in front of {who}" if who != edit.name else f"; {', '.join(keep)} would not" if keep else ""))
        if not {*leaves, "mask"} & set(r.method.facts["keeps"]):
            raise BadInput(f"{r} mends codes, and {p.steps['edit']} leaves none; put it behind rtn or gptq")
        if r is p.trainer and r is not p.repairs[-1]:
            raise BadInput(f"{r} trains behind all that works block by block; put it last")
        leaves |= dict.fromkeys(r.method.facts["leaves"], r.method.name)
    if p.keep is not None and not p.free:
        raise BadInput(f"keep is given, but {p.steps.get('unit', p.steps['edit'])} fixes its own share: leave keep out")
    return p


def unit_step(value: str, along: str = "in") -> Step:
    """A unit as a knob: row, site, 2:4 (short for nm(n=2,m=4)), block(b=32) ..."""
    value = str(value)
    if m := re.fullmatch(r"(\d+):(\d+)", value):
        value = f"nm(n={m[1]},m={m[2]})"
    name, knobs = _token(value)
    key = f"unit/{name.removeprefix('unit/')}"
    units = [m.name for m in load_all().values() if m.axis == "unit"]
    if key not in load_all():
        raise BadInput(f"unknown unit {name!r}{near(name, units)}")
    if along == "out" and "dim" in get(key).knobs:
        knobs.setdefault("dim", "out")  # a row that groups along the output does so with n:m, too
    return _step(get(key), knobs)


def grid_step(value: str) -> Step:
    """A grid as a knob: int, nf, fp(exponent=2) ..."""
    name, knobs = _token(str(value))
    key = f"grid/{name.removeprefix('grid/')}"
    if key not in load_all():
        raise BadInput(f"unknown grid {name!r}{near(name, [m.name for m in load_all().values() if m.axis == 'grid'])}")
    return _step(get(key), knobs)


def _row(row: Recipe, knobs: dict[str, Any]) -> list[Pass]:
    """A row's passes with its knobs set; a knob goes to every step that has it."""
    knobs = dict(knobs)
    whole = _pop_pass_knobs(knobs, {})
    unit, grid = knobs.pop("unit", None), knobs.pop("grid", None)
    used: set[str] = set()
    out = []
    for p in row.passes:
        steps = dict(p.steps)
        if unit is not None and "unit" in steps:
            used.add("unit")
            step = unit_step(unit, p.steps["unit"].method.facts["along"])
            steps["unit"] = step
            if "budget" in step.method.joint:
                steps.pop("budget", None)
            elif "budget" not in steps:
                steps["budget"] = Step(DEFAULTS["budget"])
        if grid is not None and "grid" in steps:
            used.add("grid")
            steps["grid"] = grid_step(grid)
        for axis, s in steps.items():
            mine = {k: v for k, v in knobs.items() if k in s.method.knobs}
            used |= set(mine)
            steps[axis] = _step(s.method, {**dict(s.knobs), **mine})
        own = whole if p.wiring is None or len(row.passes) == 1 else {k: v for k, v in whole.items() if k == "keep" and p.free}
        out.append(_checked(replace(p, steps=steps, keep=own.get("keep", p.keep), order=own.get("order", p.order))))
    if left := sorted((set(knobs) | {k for k, v in (("unit", unit), ("grid", grid)) if v is not None}) - used):
        known = sorted({k for p in row.passes for s in p.steps.values() for k in s.method.knobs}
                       | {k for p in row.passes for k in ("unit", "grid") if k in p.steps} | set(PASS_KNOBS))
        raise BadInput(f"{row.name} has no knob {left[0]!r}{near(left[0], known)}")
    return out
