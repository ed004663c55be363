"""One ONNX model, from token ids to logits, of standard operators: codes as integers behind DequantizeLinear, the rest as it is stored."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

import trimtab
from trimtab.core.types import BadInput
from trimtab.export.source import Source
from trimtab.methods.codes import Codes
from trimtab.network import graph
from trimtab.network.checkpoint import raw

FILE = "model.onnx"
DATA = "model.onnx.data"  # beside it, where a protocol buffer cannot hold the weights
LARGEST = 2_000_000_000   # bytes of weights within the file
OPSET, IR = 21, 10        # the first with integers of four bits and scales of blocks
KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16,
         torch.int64: TensorProto.INT64, torch.int8: TensorProto.INT8, torch.uint8: TensorProto.UINT8}
NAMES = {v: k for k, v in TensorProto.DataType.items()}


def write(model: Path, out: Path) -> dict[str, Any]:
    """Write `out`/model.onnx, and model.onnx.data where the weights are larger than a protocol buffer. Inputs: input_ids int64
    [batch, sequence]; outputs: logits float32 [batch, sequence, vocabulary]. Returns `types` (tensors of each), `sites_as_codes` and
    warnings. One tensor is in memory at a time where the data has a file of its own."""
    source = Source(model)
    names = source.config.get("architectures") or ["?"]
    if source.family.decoded is None or not names[0].endswith("ForCausalLM"):
        runs = ", ".join(sorted(f.name for f in graph.FAMILIES.values() if f.decoded))
        raise BadInput(f"{source.path} is a {names[0]}; trimtab writes ONNX of language models of {runs}")
    net = Writer(source)
    net.decoder(graph.describe(source.family, source.config), bool(graph.completed(source.family, source.config)["tie_word_embeddings"]))
    net.save(out)
    return {"types": dict(sorted(Counter(NAMES[x.kind] for x in net.weights if len(x.shape) > 1).items())),
            "sites_as_codes": net.kept, "warnings": net.warnings()}


@dataclass(frozen=True)
class Weight:
    """An initialiser: its name, type and shape, and what makes its bytes."""

    name: str
    kind: int
    shape: tuple[int, ...]
    make: Callable[[], bytes]

    @property
    def nbytes(self) -> int:
        return (math.prod(self.shape) * BITS.get(self.kind, 0) + 7) // 8


BITS = {TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.INT64: 64, TensorProto.INT8: 8,
        TensorProto.UINT8: 8, TensorProto.INT4: 4, TensorProto.UINT4: 4}


class Writer:
    """A graph in the making. Its methods take and return names of values."""

    def __init__(self, source: Source):
        self.source, self.nodes, self.weights, self.kept = source, list[Any](), list[Weight](), 0
        self._made: dict[str, str] = {}
        self._lost: Counter[str] = Counter()

    # ---- values -------------------------------------------------------------------------------
    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        out = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attributes))
        return out

    def constant(self, value: Tensor | list[int] | float) -> str:
        t = value if isinstance(value, Tensor) else torch.tensor(value)
        key = f"constant {t.dtype} {t.tolist()}"
        if key not in self._made:
            self._made[key] = self._add(Weight(f"constant_{len(self.weights)}", KINDS[t.dtype], tuple(t.shape), lambda: bytes(raw(t))))
        return self._made[key]

    def _add(self, weight: Weight) -> str:
        self.weights.append(weight)
        return weight.name

    def stored(self, name: str, transposed: bool = False) -> str:
        """A tensor as the files have it; a matrix [out, in] as [in, out] if `transposed`."""
        key = f"stored {name} {transposed}"
        if key not in self._made:
            found = self.source.find(name)
            if found is None:
                raise BadInput(f"tensor {name} is missing from {self.source.path}; its config.json asks for it")
            e = self.source.checkpoint.tensors[found]
            if e.dtype not in KINDS:
                raise BadInput(f"tensor {found} of {self.source.path} is {e.dtype}; trimtab writes ONNX of float32, float16 and bfloat16")
            shape = e.shape[::-1] if transposed else e.shape

            def make() -> bytes:
                t = self.source.read(name)
                return bytes(raw(t.T if transposed else t))

            self._made[key] = self._add(Weight(name, KINDS[e.dtype], shape, make))
        return self._made[key]

    def wide(self, name: str, dtype: torch.dtype) -> str:
        """In float32."""
        return name if dtype == torch.float32 else self.op("Cast", name, to=TensorProto.FLOAT)

    def _dtype(self, name: str) -> torch.dtype:
        return self.source.checkpoint.tensors[self.source.find(name) or name].dtype

    def floats(self, name: str, transposed: bool = False) -> str:
        """A stored tensor in float32."""
        key = f"floats {name} {transposed}"
        if key not in self._made:
            self._made[key] = self.wide(self.stored(name, transposed), self._dtype(name))
        return self._made[key]

    # ---- layers -------------------------------------------------------------------------------
    def linear(self, x: str, m: Any, site: str = "") -> str:
        """x [..., in] through a map of a description, which is a site or the head."""
        name, bias = (m["linear"], m.get("bias")) if isinstance(m, Mapping) else (m, None)
        codes = self.source.codes(site) if site else None
        factors = self.source.factors(site) if site and codes is None else None
        if codes is not None and storable(codes):
            self.kept += 1
            y = self.op("MatMul", x, self._codes(name, site, codes))
        elif factors is not None:
            y = self.op("MatMul", self.op("MatMul", x, self._factor(name, site, "right")), self._factor(name, site, "left"))
        else:
            if codes is not None:
                self._lost[f"{codes.type} in groups of {codes.group}"] += 1
            y = self.op("MatMul", x, self.floats(f"{name}.weight", transposed=True))
        return self.op("Add", y, self.floats(bias)) if bias else y

    def _factor(self, name: str, site: str, side: str) -> str:
        factors = self.source.factors(site)
        assert factors is not None
        t = getattr(factors, side)

        def make() -> bytes:
            return bytes(raw(getattr(self.source.factors(site), side).T))

        return self.wide(self._add(Weight(f"{name}.{side}", KINDS[t.dtype], tuple(t.shape[::-1]), make)), t.dtype)

    def _codes(self, name: str, site: str, codes: Codes) -> str:
        """Codes [out, in] as integers [in, out], made floats by their scales: one a column, or one for each block of rows."""
        few, signed = codes.grid.levels <= 16, codes.grid.zeros is None
        kind = (TensorProto.INT4 if signed else TensorProto.UINT4) if few else TensorProto.INT8 if signed else TensorProto.UINT8
        out, inputs = codes.codes.shape
        whole = codes.group == inputs
        shape = (out,) if whole else (-(-inputs // codes.group), out)

        def laid(t: Tensor) -> Tensor:
            return t[:, 0] if whole else t.T

        def again() -> Codes:
            found = self.source.codes(site)
            assert found is not None
            return found

        def steps() -> bytes:
            c = again()
            return _integers(c.codes.T.to(torch.int16) - (c.grid.levels // 2 if signed else 0), few)

        given = [self._add(Weight(f"{name}.codes", kind, (inputs, out), steps)),
                 self._add(Weight(f"{name}.scales", TensorProto.FLOAT, shape, lambda: bytes(raw(laid(again().grid.scales).float()))))]
        if not signed:
            given.append(self._add(Weight(f"{name}.zeros", kind, shape, lambda: _integers(laid(again().grid.zero()).to(torch.int16), few))))
        return self.op("DequantizeLinear", *given, **({"axis": 1} if whole else {"axis": 0, "block_size": codes.group}))

    def norm(self, x: str, of: Mapping[str, Any]) -> str:
        """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.constant([-1]), keepdims=1)
        size = self.op("Sqrt", self.op("Add", mean, self.constant(float(of["eps"]))))
        return self.op("Mul", self.op("Div", x, size), self.floats(of["weight"]))

    def heads(self, x: str, count: int, dim: int) -> str:
        """[batch, sequence, count * dim] -> [batch, count, sequence, dim]"""
        return self.op("Transpose", self.op("Reshape", x, self.constant([0, 0, count, dim])), perm=[0, 2, 1, 3])

    def angles(self, rope: Mapping[str, Any]) -> tuple[str, str]:
        """Cosines and sines of every position, [sequence, head_dim] each."""
        inverse = torch.tensor(rope["inverse_frequencies"], dtype=torch.float32)
        key = f"angles {inverse.tolist()} {rope['scaling']}"
        if key not in self._made:
            at = self.op("Unsqueeze", self.op("Cast", self.positions(), to=TensorProto.FLOAT), self.constant([1]))
            angle = self.op("Mul", at, self.constant(torch.cat([inverse, inverse])[None]))
            scale = self.constant(float(rope["scaling"]))
            self._made[key] = self.op("Mul", self.op("Cos", angle), scale)
            self._made[f"{key} sin"] = self.op("Mul", self.op("Sin", angle), scale)
        return self._made[key], self._made[f"{key} sin"]

    def positions(self) -> str:
        """0 to the length - 1, int64 [sequence]."""
        if "positions" not in self._made:
            length = self.op("Squeeze", self.op("Shape", "input_ids", start=1, end=2), self.constant([0]))
            self._made["positions"] = self.op("Range", self.constant(torch.tensor(0)), length, self.constant(torch.tensor(1)))
        return self._made["positions"]

    def mask(self, window: int | None) -> str:
        """0 where a position sees another, the lowest number where it does not, [sequence, sequence]."""
        key = f"mask {window}"
        if key not in self._made:
            back = self.op("Sub", *(self.op("Unsqueeze", self.positions(), self.constant([axis])) for axis in (1, 0)))
            seen = self.op("GreaterOrEqual", back, self.constant(torch.tensor(0)))
            if window:
                seen = self.op("And", seen, self.op("Less", back, self.constant(torch.tensor(window))))
            low = torch.tensor(torch.finfo(torch.float32).min)
            self._made[key] = self.op("Where", seen, self.constant(0.0), self.constant(low))
        return self._made[key]

    def turned(self, x: str, angles: tuple[str, str], dim: int) -> str:
        """Rotary positions on [..., sequence, dim], the halves of a head in pairs."""
        first, second = f"{x}_first", f"{x}_second"
        self.nodes.append(helper.make_node("Split", [x, self.constant([dim // 2, dim - dim // 2])], [first, second], axis=-1))
        other = self.op("Concat", self.op("Neg", second), first, axis=-1)
        return self.op("Add", self.op("Mul", x, angles[0]), self.op("Mul", other, angles[1]))

    def attention(self, x: str, of: Mapping[str, Any], i: int) -> str:
        h, kv, d = of["heads"], of["kv_heads"], of["head_dim"]
        inner = self.norm(x, of["norm"])
        angles = self.angles(of["rope"])

        def made(role: str, count: int) -> str:
            y = self.heads(self.linear(inner, of[role], f"{i}.attn.{role}"), count, d)
            if f"{role}_norm" in of:
                y = self.norm(y, of[f"{role}_norm"])
            return y if role == "v" else self.turned(y, angles, d)

        # Heads that share their keys stand beside each other: [batch, kv, heads of each, sequence, dim].
        q = self.op("Reshape", made("q", h), self.constant([0, kv, h // kv, -1, d]))
        k, v = (self.op("Unsqueeze", made(role, kv), self.constant([2])) for role in ("k", "v"))
        scores = self.op("Mul", self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 2, 4, 3])), self.constant(d**-0.5))
        shares = self.op("Softmax", self.op("Add", scores, self.mask(of.get("window"))), axis=-1)
        seen = self.op("Reshape", self.op("MatMul", shares, v), self.constant([0, h, -1, d]))
        joined = self.op("Reshape", self.op("Transpose", seen, perm=[0, 2, 1, 3]), self.constant([0, 0, h * d]))
        return self.op("Add", x, self.linear(joined, of["o"], f"{i}.attn.o"))

    def mlp(self, x: str, of: Mapping[str, Any], i: int) -> str:
        inner = self.norm(x, of["norm"])
        gate, up = (self.linear(inner, of[role], f"{i}.mlp.{role}") for role in ("gate", "up"))
        kind = of["activation"]
        if kind == "silu":
            gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        elif kind == "relu":
            gate = self.op("Relu", gate)
        else:
            gate = self.op("Gelu", gate, approximate="tanh" if kind == "gelu_tanh" else "none")
        return self.op("Add", x, self.linear(self.op("Mul", gate, up), of["down"], f"{i}.mlp.down"))

    def decoder(self, of: Mapping[str, Any], tied: bool) -> None:
        """The graph from input_ids to logits."""
        table = of["embedding"]
        x = self.wide(self.op("Gather", self.stored(table), "input_ids"), self._dtype(table))
        for i, (attention, mlp) in enumerate(of["layers"]):
            x = self.mlp(self.attention(x, attention, i), mlp, i)
        x = self.norm(x, of["norm"])
        head = self.op("Transpose", self.floats(table), perm=[1, 0]) if tied else self.floats(f"{of['head']}.weight", transposed=True)
        self.op("MatMul", x, head, name="logits")
        self.vocabulary = of["vocabulary"]

    # ---- the file -----------------------------------------------------------------------------
    def warnings(self) -> list[str]:
        return [f"{n} layers of codes ({what}) are no integers of ONNX and are stored as ordinary numbers, no smaller"
                for what, n in self._lost.items()]

    def save(self, out: Path) -> None:
        large = sum(w.nbytes for w in self.weights) > LARGEST
        tensors, at = [], 0
        with open(out / DATA if large else out / FILE, "wb") as f:
            for w in self.weights:
                t = TensorProto(name=w.name, data_type=w.kind, dims=w.shape)
                if large and w.nbytes >= 1024:  # small ones have to stand in the file, for the shapes they say
                    t.data_location = TensorProto.EXTERNAL
                    for k, v in (("location", DATA), ("offset", at), ("length", w.nbytes)):
                        t.external_data.add(key=k, value=str(v))
                    f.write(w.make() + bytes(-w.nbytes % 4096))
                    at = f.tell()
                else:
                    t.raw_data = w.make()
                tensors.append(t)
            model = self._model(tensors).SerializeToString()
            if not large:
                f.write(model)
        if large:
            (out / FILE).write_bytes(model)

    def _model(self, tensors: list[TensorProto]) -> ModelProto:
        ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", self.vocabulary])
        made = helper.make_graph(self.nodes, self.source.path.resolve().name, [ids], [logits], tensors)
        return helper.make_model(made, producer_name="trimtab", producer_version=trimtab.__version__, ir_version=IR,
                                 opset_imports=[helper.make_opsetid("", OPSET)], doc_string=self.source.notes.get("pipeline") or "")


def storable(codes: Codes) -> bool:
    """Whether the codes are integers that standard ONNX dequantises: equal steps, of eight bits or of four at most, in groups that
    fill a row."""
    return codes.grid.table is None and codes.codes.shape[1] % codes.group == 0


def _integers(steps: Tensor, few: bool) -> bytes:
    """Integers of eight bits, or of four: two a byte, the first in the low bits."""
    flat = steps.reshape(-1).numpy().astype(np.int8).view(np.uint8)
    if not few:
        return flat.tobytes()
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)]) & 15
    return (flat[::2] | flat[1::2] << 4).tobytes()
