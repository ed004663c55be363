from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trimtab.core.registry import method
from trimtab.core.types import BadInput, Change
from trimtab.methods.codes import Codes
from trimtab.methods.format.panels import TYPES, Packed, Values, matrix, pattern

ROWS, WINDOW = 16, 128  # outputs of a panel, and inputs that the entries of a step lie in
EACH = 2                # entries an output has in a step
SLOTS = ROWS * EACH
SOME = 512              # panels that are laid out together


def size(shape: tuple[int, int], values: Values, kept: int, knobs: dict[str, Any]) -> dict[str, int]:
    return {"values": kept * (2 if values.type == "bf16" else 4), "columns": kept, "windows": kept // SLOTS * 4,
            "pointers": 8 * (-(-shape[0] // ROWS) + 1)}


def stored(p: Packed) -> int:
    """Entries that are stored, the fill among them. BadInput unless every one lies inside."""
    pointers, windows, columns = (p.buffers[k] for k in ("pointers", "windows", "columns"))
    if (p.rows, p.cols) != (ROWS, min(WINDOW, p.shape[1])):
        raise BadInput(f"sell: panels are {ROWS} outputs high and windows {WINDOW} inputs wide")
    if len(pointers) != -(-p.shape[0] // ROWS) + 1 or int(pointers[0]) or int(pointers[-1]) != len(windows) \
            or bool((pointers[1:] < pointers[:-1]).any()):
        raise BadInput(f"sell: the pointers do not divide the {len(windows)} steps among the panels")
    if columns.numel() != len(windows) * SLOTS:
        raise BadInput(f"sell: {len(windows)} steps of {SLOTS} entries, and {columns.numel()} are there")
    if bool(((windows < 0) | (windows > p.shape[1] - p.cols)).any()) or bool((columns >= p.cols).any()):
        raise BadInput("sell: an entry lies outside the matrix")
    return columns.numel()


def restore(p: Packed) -> Tensor:
    values, down = p.buffers["values"], -(-p.shape[0] // ROWS)
    panel = torch.repeat_interleave(torch.arange(down, device=values.device), p.buffers["pointers"].diff())
    row = panel[:, None, None] * ROWS + torch.arange(ROWS, device=values.device)[:, None]
    column = p.buffers["windows"].long()[:, None, None] + p.buffers["columns"].reshape(-1, ROWS, EACH).long()
    w = torch.zeros(down * ROWS, p.shape[1], dtype=values.dtype, device=values.device)
    w.index_put_((row.expand_as(column), column), values.reshape(-1, ROWS, EACH), accumulate=True)
    return w[:p.shape[0]].contiguous()


def steps(kept: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """kept [panels * ROWS, in], of some panels -> of each panel: how many steps it has; where the window of each begins
    [steps]; which entry lies in each slot, as its index in `kept`, -1 where none does [steps, ROWS, EACH].

    A window begins with the first entry that is left of any output; every output gives what it has in it, two at most.
    """
    inputs, device = kept.shape[1], kept.device
    entries = torch.nn.functional.pad(kept.nonzero()[:, 1], (0, EACH), value=inputs)
    end = kept.sum(1).cumsum(0)
    at = torch.nn.functional.pad(end, (1, -1))
    flat = torch.arange(len(kept), device=device) * inputs
    windows, slots = [], []
    while bool((at < end).any()):
        column = torch.stack([entries[at + k].masked_fill(at + k >= end, inputs) for k in range(EACH)], 1)
        first = column[:, 0].view(-1, ROWS).min(1).values
        window = first.clamp(max=max(0, inputs - WINDOW))
        taken = column < (window + WINDOW).clamp(max=inputs).repeat_interleave(ROWS)[:, None]
        windows.append(torch.where(first < inputs, window, -1).int())
        slots.append(torch.where(taken, flat[:, None] + column, -1))
        at = at + taken.sum(1)
    if not windows:
        windows, slots = [torch.full((len(kept) // ROWS,), -1, dtype=torch.int32)], [torch.full((len(kept), EACH), -1)]
    begin, slot = torch.stack(windows, 1), torch.stack(slots, 1)  # [panels, steps], [panels * ROWS, steps, EACH]
    for mine, its in zip(begin, slot.view(-1, ROWS, *slot.shape[1:]).transpose(1, 2), strict=True):
        count = (mine >= 0).sum()
        yield count, mine[:count], its[:count]


@method("format", inverse=restore, holds="mask", bytes=size, stored=stored)
def sell(new: Change) -> Packed:
    """Sliced rows of entries: every step holds two of each of 16 outputs, all from a window of 128 inputs that moves along.

    Registers hold the window, so that one instruction looks up what 32 entries meet: the layout of single weights where a quarter
    or fewer are kept. Above that `bitmask` takes fewer bytes, and with one row of x less time. A window begins with the first
    entry that is left of any output; an output with less than two entries in it is filled up with zeros.

    Panels lie one after the other: `values` [steps, 16, 2], `columns` uint8 [steps, 16, 2] from the first input of the window
    on, `windows` int32 [steps]: that input, `pointers` int64 [panels + 1]: the steps of each panel. A dropped entry is restored
    as +0. BadInput for codes.

    Formula: bytes = 32 * steps * (itemsize + 1) + 4 * steps + 8 * (ceil(out / 16) + 1); of random zeros about 1.15 slots an
    entry at a tenth kept, 1.06 at three tenths
    Source: slices as in Kreutzer et al. 2014, arXiv:1307.6209
    Deviations: a slice is not filled up to its longest row: entries of one step need not be the same ones of their rows, only
    lie in one window; rows are not sorted by length
    """
    w = matrix(new)
    if isinstance(w, Codes):
        raise BadInput(f"sell: holds no codes of type {w.type}; use bitmask for those of 8 bits, or dense")
    shape = (w.shape[0], w.shape[1])
    kept = torch.nn.functional.pad(pattern(new), (0, 0, 0, -shape[0] % ROWS))
    counts, windows, columns, values = [], [], [], []
    for n, some in enumerate(kept.split(SOME * ROWS)):
        rows = w[n * SOME * ROWS:(n + 1) * SOME * ROWS].reshape(-1)
        for count, window, slot in steps(some):
            counts.append(count)
            windows.append(window)
            none = slot < 0
            values.append(rows[slot.clamp(min=0)].masked_fill(none, 0))
            columns.append((slot % shape[1] - window[:, None, None]).masked_fill(none, 0).to(torch.uint8))
    pointers = torch.nn.functional.pad(torch.stack(counts).cumsum(0), (1, 0))
    return Packed("sell", shape, TYPES[w.dtype], {"values": torch.cat(values), "columns": torch.cat(columns), "windows": torch.cat(windows),
                                                  "pointers": pointers}, rows=ROWS, cols=min(WINDOW, shape[1]))
