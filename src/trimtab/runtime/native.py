"""The compiled kernels, where they were built; what they would do in torch, where they were not."""
from __future__ import annotations

import warnings
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

import trimtab
from trimtab.core.types import BadInput, Change
from trimtab.methods import composite
from trimtab.methods.codes import e4m3_step
from trimtab.methods.composite import BASED, STACK, SUM
from trimtab.methods.format.dense import dense
from trimtab.methods.format.panels import BITS, DENSE, Packed
from trimtab.methods.gates import HIDDEN, INPUT, Gate, gate_of
from trimtab.methods.rounding import rounding_of
from trimtab.runtime import layouts

AGAIN = "install trimtab again (pip install, or make setup in a checkout)"
NONE = f"the native kernels were not built (no C++ compiler when trimtab was installed); where there is one, {AGAIN}"
SLOWLY = "packed weights run in torch, slowly"


class RunsInTorch(UserWarning):
    """A packed weight saves bytes here, and no time."""


@cache
def _found() -> tuple[Any | None, str]:
    """The extension module, or why there is none; one of another version is as good as none."""
    try:
        import _trimtab_kernels as built
    except ModuleNotFoundError:
        return None, NONE
    except ImportError as e:
        return None, f"the native kernels were built and do not load here ({' '.join(str(e).split())}); {AGAIN}"
    if trimtab.__version__ != built.VERSION:
        return None, f"the native kernels were built for trimtab {built.VERSION}, this is {trimtab.__version__}; {AGAIN}"
    return built, ""


def core() -> Any | None:
    """The extension module, or None."""
    return _found()[0]


def absent() -> str:
    """Why there are no kernels, and what to do."""
    return _found()[1] or NONE


def isas() -> list[str]:
    """Instruction sets that kernels were built for and this processor has, best last."""
    return core().isas() if core() else []


def kernels() -> list[dict[str, Any]]:
    """Every kernel: name, op, format, type, isa, and whether it runs `here`."""
    return list(core().kernels()) if core() else []


def level() -> str:
    """In a word, for `--version`."""
    return isas()[-1] if core() else "torch (native kernels not built)"


def kind(p: Packed) -> str:
    """In words: what decides whether a kernel takes it."""
    if p.format in composite.FORMATS:
        return " + ".join(map(kind, p.factors))
    what = {"nm": [f"{p.n}:{p.m} along the {p.dim}put"], "bsr": [f"blocks of {p.rows} x {p.cols}"], "book": [f"vectors of {p.rows}"],
            "lowrank": [f"rank {f.shape[0]}" for f in p.factors[:1]]}.get(p.format, [])
    what += [f"groups of {p.group}"] if p.type in DENSE else []
    return f"{p.format} {p.type}" + (f" ({', '.join(what)})" if what else "")


def _strange(p: Packed) -> bool:
    """A layout that saves bytes, not time: the kernels do not know it."""
    if p.type == "l8" and e4m3_step(p.buffers["table"]) is None:
        return True
    if p.format == "nm" and (p.m not in (4, 8) or p.dim == "out" or (p.type in BITS and p.n * 2 != p.m)):
        return True
    return p.rows > 1024 or (p.type in DENSE and p.format != "bsr" and p.group < p.shape[1] and p.group % 32 != 0)


class Linear:
    """A packed weight ready to run: y [batch, out] = x [batch, in] W^T in float32.

    `kernels`: names of those that can run it here, best last; empty where torch does it, which is said in one warning.
    `factors`: where the weight is made of several, those; kernels are then the ones of the first that run, as far as they can, the rest.
    What is multiplied entry by entry is the weight it stands for, made here: `packed` is that then.
    BadInput if the buffers contradict each other: every index and length is checked once, here.
    """

    def __init__(self, packed: Packed):
        self.gate = gate_of(packed)
        if packed.format == "entrywise":
            layouts.check(packed)
            packed = dense(Change(layouts.restored(packed).to(torch.bfloat16 if packed.type == "bf16" else torch.float32)))
        self.packed, self._weight = packed, None
        self.kernels: list[str] = []
        self.factors: list[Linear] = []
        if packed.factors:
            layouts.check(packed)
            self.factors = [Linear(f) for f in packed.factors]
            if packed.format == BASED:
                self._around = composite.around(packed)
            # Factors are of one kind; what is added need not be: each runs on its own best one.
            alike = packed.format == "lowrank"
            self.kernels = [k for k in self.factors[0].kernels if all(k in f.kernels if alike else f.kernels for f in self.factors)]
            return
        if core() is None or _strange(packed):
            layouts.check(packed)
        else:
            raw = {k: t.contiguous().view(-1).view(torch.uint8) for k, t in packed.buffers.items()}
            none = torch.empty(0, dtype=torch.uint8)
            scale_type = {torch.float32: "f32", torch.float16: "f16"}.get(packed.buffers.get("scales", none).dtype, "")
            step = float(packed.buffers["act_scale"]) if "act_scale" in packed.buffers else 0.0
            try:
                self._native = core().Linear(
                    packed.format, packed.type, *packed.shape, packed.rows, packed.cols, packed.n, packed.m, packed.group, scale_type,
                    packed.act_bits, step,
                    *(raw.get(k, none) for k in ("values", "bits", "columns", "pointers", "windows", "scales", "zeros", "table", "book",
                                            "residual", "residual_book")))
            except ValueError as e:
                raise BadInput(str(e)) from None
            self.kernels = list(dict.fromkeys(k for t in ("f32", "bf16", "i8") for k in self._native.kernels(t)))
        if not self.kernels:
            p = packed
            told = f"no kernel here takes {kind(p)}: it saves bytes, not time, and runs in torch" if core() else f"{absent()}; {SLOWLY}"
            warnings.warn(told, RunsInTorch, stacklevel=2)
            self._weight = layouts.restored(packed).float()

    def gate_of_rows(self, rows: tuple[int, ...] | None) -> Gate | None:
        """Of those of its outputs, (begin, end), or all: maps that stand one after the other have one each."""
        if self.packed.format != STACK or rows is None:
            return self.gate
        begins = accumulate([0, *(f.packed.shape[0] for f in self.factors)])
        return next((f.gate for begin, f in zip(begins, self.factors, strict=False) if begin == rows[0]), None)

    @property
    def weight_bytes(self) -> int:
        """What a call reads of the weight."""
        if self.factors:
            return sum(f.weight_bytes for f in self.factors)
        return self.packed.nbytes if self._weight is None else self._weight.nbytes

    def __call__(self, x: Tensor, kernel: str = "", threads: int = 0, narrowest: str = "", scored: Tensor | None = None) -> Tensor:
        """x [..., in]. `kernel`: one of `kernels`, the best if not said; `threads`: torch's number if 0.

        `narrowest`: what x may be rounded to before it is multiplied: f32 (not at all), bf16, or i8 (by groups of inputs where
        the weights are codes or vectors of a book, bf16 elsewhere); bf16 where x is bfloat16 and f32 elsewhere if not said. What the
        weight itself says of its inputs goes before that. `scored`: what its gate scores, where that is not x: [..., in], the gate of the
        MLP it ends, activated, or [..., width], what is given to its sublayer. BadInput for what does not run here.
        """
        if x.shape[-1] != self.packed.shape[1]:
            raise BadInput(f"x has {x.shape[-1]} features, the packed weight takes {self.packed.shape[1]}")
        narrowest = narrowest or ("bf16" if x.dtype == torch.bfloat16 else "f32")
        if self.gate is not None:
            x = x * self.gate.mask(self._scored(x, scored))
        if self.factors:
            return self._composed(x, kernel, threads, narrowest)
        if self._weight is not None:
            rounding = rounding_of(self.packed)
            return torch.nn.functional.linear(x.float() if rounding is None else rounding.of(x), self._weight)
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        y = torch.empty(rows.shape[0], self.packed.shape[0])
        try:  # as NumPy sees them: a tensor takes microseconds to be handed over
            self._native.run(rows.detach().numpy(), y.numpy(), threads or torch.get_num_threads(), kernel, narrowest)
        except ValueError as e:
            raise BadInput(str(e)) from None
        return y.view(*x.shape[:-1], self.packed.shape[0])

    def _scored(self, x: Tensor, scored: Tensor | None) -> Tensor:
        assert self.gate is not None
        if self.gate.of == INPUT:
            return x
        hidden = self.gate.of == HIDDEN
        if scored is None or scored.shape[:-1].numel() != x.shape[:-1].numel() or (hidden and scored.shape[-1] != x.shape[-1]):
            who = "the gate of an MLP" if hidden else "what its sublayer is given"
            raise BadInput(f"which inputs are computed is decided by {who}, and this map is run without it; run the whole model")
        return scored.reshape(*x.shape[:-1], scored.shape[-1])

    def _composed(self, x: Tensor, kernel: str, threads: int, narrowest: str) -> Tensor:
        """What is made of several: one after the other, added, or with a change of inputs and outputs around it."""
        if self.packed.format == BASED:
            taken, inside, outside = self._around
            x = x.float() if taken is None else x.float()[..., taken.long()]
            y = self.factors[0](x if inside is None else inside.of(x), kernel, threads, narrowest)
            return y if outside is None else outside.straight(y)
        if self.packed.format == STACK:
            return torch.cat([f(x, kernel if kernel in f.kernels else "", threads, narrowest) for f in self.factors], -1)
        if self.packed.format == SUM:
            y = self.factors[0](x, kernel, threads, narrowest)
            for f in self.factors[1:]:
                y += f(x, kernel if kernel in f.kernels else "", threads, narrowest)
            return y
        for f in self.factors:
            x = f(x, kernel, threads, narrowest)
        return x


def _gate(g: Gate | None) -> Any | None:
    """As the core has it, without the maps of a router."""
    if g is None:
        return None
    threshold = 0.0 if g.threshold is None else float(g.threshold)
    return core().Gate(g.of, g.count, threshold, [] if g.scale is None else g.scale.tolist(), g.group, g.pool)


class Mlp:
    """The MLP of three packed weights, two without a gate, as one operation: y = down(f(gate(x)) * up(x)) in float32.

    `activation`: silu, gelu, gelu_tanh or relu. BadInput where the shapes do not meet, or a layout has no kernel here.
    """

    def __init__(self, gate: Linear | None, up: Linear, down: Linear, activation: str):
        given = [m for m in (gate, up, down) if m is not None]
        if not all(m.kernels for m in given):
            raise BadInput("an MLP runs on native kernels alone, and one of its weights has none here")
        if any(m.factors for m in given):
            raise BadInput("an MLP of three weights takes none that is made of others; a decoder runs them")
        try:
            gates = [m and _gate(m.gate) for m in (gate, up, down)]
            self._native = core().Mlp(gate and gate._native, up._native, down._native, activation, gates)
        except ValueError as e:
            raise BadInput(str(e)) from None
        self.shape = (down.packed.shape[0], up.packed.shape[1])

    def __call__(self, x: Tensor, threads: int = 0, narrowest: str = "") -> Tensor:
        """x [..., in]; `threads` and `narrowest` as `Linear` has them."""
        if x.shape[-1] != self.shape[1]:
            raise BadInput(f"x has {x.shape[-1]} features, the MLP takes {self.shape[1]}")
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        y = torch.empty(rows.shape[0], self.shape[0])
        narrowest = narrowest or ("bf16" if x.dtype == torch.bfloat16 else "f32")
        try:
            self._native.run(rows.detach().numpy(), y.numpy(), threads or torch.get_num_threads(), narrowest)
        except ValueError as e:
            raise BadInput(str(e)) from None
        return y.view(*x.shape[:-1], self.shape[0])
