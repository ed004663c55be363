"""What a kernel's name says: <op>_<activation>_<format>-<type>_<isa>, such as linear_f32_bsr32-bf16_avx512."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

OPS = ("linear",)
ACTIVATIONS = ("f32", "bf16", "i8")
TYPES = ("f32", "bf16", "i8", "i4", "i3", "i2", "t", "v", "l8", "l4", "l3", "l2", "l1")
FORMATS = r"dense|columns|bsr(?:16|32x1|32|64|1x32)|bitmask|sell|nm[48]|book"
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "neon")
NAME = re.compile(rf"({'|'.join(OPS)})_({'|'.join(ACTIVATIONS)})_({FORMATS})-({'|'.join(TYPES)})_({'|'.join(ISAS)})")


@dataclass(frozen=True)
class Name:
    """op; type of the activations; format with its block (a side, or outputs x inputs) or group; type of the weights; instruction set."""

    op: str
    activation: str
    format: str
    type: str
    isa: str

    def __str__(self) -> str:
        return f"{self.op}_{self.activation}_{self.format}-{self.type}_{self.isa}"


def of_source(folder: Path) -> list[str]:
    """The names of all kernels for all processors, as the C++ table in `folder` has them."""
    text = (folder / "isa" / "table.inc").read_text(encoding="utf-8")
    every, _, some = text.rpartition("#if defined(__AVX512BF16__)")
    kinds = [re.findall(r'\{(F32|BF16|I8)\("([^"]+)"\)', part) for part in (every, every + some)]
    return [f"linear_{macro.lower()}_{kind}_{isa}" for isa in ISAS if (folder / "isa" / f"{isa}.cpp").exists()
            for macro, kind in kinds[isa == "avx512bf16"]]


def parse(text: str) -> Name:
    """ValueError for a name outside the grammar."""
    m = NAME.fullmatch(text)
    if not m:
        raise ValueError(f"{text!r} is no kernel name: <op>_<activation>_<format>-<type>_<isa>")
    return Name(*m.groups())
