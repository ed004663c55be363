from __future__ import annotations

import torch

from tests.cases import Case
from trimtab.core.types import Change

# A pattern that is at once 2:4 along the input and one block of 1 x 2 in each row.
W = torch.tensor([[0.0, 0.0, 5.0, -7.0], [2.0, 3.0, 0.0, 0.0]])
PAIRS = Change(W, mask=W != 0)
# A group with one entry only: filled up with a zero at its first free place.
THIN = Change(torch.tensor([[0.0, 0.0, 4.0, 0.0], [6.0, 0.0, 0.0, 1.0]]))

CASES = {
    "format/dense": Case({"new": PAIRS}, {"weight": W}, differs="format/bitmask"),
    # Entries 2, 3, 4, 5 of eight: 4 + 8 + 16 + 32.
    "format/bitmask": Case({"new": PAIRS}, {"bits": [60], "values": [5, -7, 2, 3]}, differs="format/nm"),
    # Places 0, 2 and 0, 3 in two bits each, lowest first: 0 + 2*4 + 0*16 + 3*64.
    "format/nm": Case({"new": THIN}, {"index": [200], "values": [[[0, 4]], [[6, 1]]]}, differs="format/bitmask"),
    # Block row 0 holds block column 1, block row 1 holds block column 0.
    "format/bsr": Case({"new": PAIRS}, {"columns": [1, 0], "pointers": [0, 1, 2], "values": [[[5, -7]], [[2, 3]]]},
                       {"rows": 1, "cols": 2}, differs="format/bitmask"),
}
