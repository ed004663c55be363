from __future__ import annotations

import torch

from tests.cases import Case
from trimtab.core.types import Change
from trimtab.methods.books import Books
from trimtab.methods.codes import Codes, Grid
from trimtab.methods.entrywise import Entrywise
from trimtab.methods.factors import Factors

# A pattern that is at once 2:4 along the input and one block of 1 x 2 in each row.
W = torch.tensor([[0.0, 0.0, 5.0, -7.0], [2.0, 3.0, 0.0, 0.0]])
PAIRS = Change(W, mask=W != 0)
# A group with one entry only: filled up with a zero at its first free place.
THIN = Change(torch.tensor([[0.0, 0.0, 4.0, 0.0], [6.0, 0.0, 0.0, 1.0]]))
# Four bits: inputs 0 to 3 are the low halves of the bytes of a word, inputs 4 to 7 the high halves.
FOUR = Codes(torch.tensor([[1, 2, 8, 8, 5, 6, 8, 8]], dtype=torch.uint8), Grid(torch.tensor([[0.5]]), 16), 8).change()


# Rank 1: (3, 4)^T (5, 6, 7).
PAIR = Factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0, 6.0, 7.0]])).change()


# That, entry by entry with (1, 2)^T (1, 0, 1).
BOTH = Entrywise(Factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0, 6.0, 7.0]])),
                 Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.0, 1.0]]))).change()


# Vector 0, 1 and 3 of four, for outputs 0 and 1; then 2, 0 and 0 for output 2, which is alone.
VECTORS = Books(torch.tensor([[0, 1, 3], [2, 0, 0]], dtype=torch.uint8), torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8]]).half(),
                torch.tensor([1.0, 0.5, 2]).half()).change()


def panel(*inputs: list[float]) -> torch.Tensor:
    """[1, inputs, 32]: of every input the first outputs; the panel is filled up with zeros."""
    return torch.tensor([[x + [0.0] * (32 - len(x)) for x in inputs]])


CASES = {
    "format/dense": Case({"new": FOUR}, {
        "values": torch.cat([torch.tensor([[[[0x51, 0x62, 0x88, 0x88]]]]), torch.zeros(1, 1, 31, 4)], 2), "scales": panel([0.5])},
        differs="format/nm"),
    # Of three inputs one output, the rank; of that two.
    "format/lowrank": Case({"new": PAIR}, {"right_values": panel([5], [6], [7]), "left_values": panel([3, 4])}, differs="format/dense"),
    # (3, 4)^T (5, 6, 7) and (1, 2)^T (1, 0, 1), each as lowrank has it.
    "format/entrywise": Case({"new": BOTH}, {"first_right_values": panel([5], [6], [7]), "first_left_values": panel([3, 4]),
                                             "second_right_values": panel([1], [0], [1]), "second_left_values": panel([1, 2])},
                             differs="format/dense"),
    # Of two bits: a byte holds an index of vectors 0, 4, 8 and 12, or of 1, 5, 9 and 13, and one of inputs 0 to 3.
    "format/book": Case({"new": VECTORS}, {"values": [[[0, 1, 3, 0, 2, 0, 0, 0] + [0] * 8]], "book": [[1, 2], [3, 4], [5, 6], [7, 8]],
                                           "scales": [1, 0.5, 2]}, differs="format/dense"),
    # Input by input: output 1 keeps its inputs 0 and 1, output 0 its inputs 2 and 3; four bytes an input. 64 bytes behind the
    # four values of 16 bytes, filled up to 128: 32 numbers.
    "format/bitmask": Case({"new": PAIRS}, {"bits": [2, 0, 0, 0] * 2 + [1, 0, 0, 0] * 2, "values": [2, 3, 5, -7] + [0] * 28},
                           differs="format/nm"),
    # One step: output 0 has its inputs 2 and 3 in it, output 1 its inputs 0 and 1, the other 14 of the panel nothing.
    "format/sell": Case({"new": PAIRS}, {"columns": [[[2, 3], [0, 1]] + [[0, 0]] * 14], "pointers": [0, 1], "windows": [0],
                                         "values": [[[5, -7], [2, 3]] + [[0, 0]] * 14]}, differs="format/bitmask"),
    # Of each output two values, at places 0 and 2, 0 and 3, of the empty outputs 0 and 1: two bits each in a word, lowest first.
    "format/nm": Case({"new": THIN}, {"bits": [[[[2 * 4, 0, 0, 0], [3 * 4, 0, 0, 0], *[[1 * 4, 0, 0, 0]] * 30]]],
                                      "values": panel([0, 6], [4, 1])}, differs="format/bitmask"),
    # Input by input: of input 0 its code for output 0, in the low half of byte 0; the other 127 outputs are filled up with zeros.
    "format/columns": Case({"new": FOUR}, {"values": [[c] + [0] * 63 for c in (1, 2, 8, 8, 5, 6, 8, 8)], "scales": [[0.5] + [0] * 127]},
                           differs="format/dense"),
    # Block row 0 holds block column 1, block row 1 holds block column 0.
    "format/bsr": Case({"new": PAIRS}, {"columns": [1, 0], "pointers": [0, 1, 2], "values": [[[5], [-7]], [[2], [3]]]},
                       {"rows": 1, "cols": 2}, differs="format/bitmask"),
}
