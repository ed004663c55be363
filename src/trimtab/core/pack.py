"""Which format a site is stored in, and the packed directory: the layers as kernels read them, everything else as it was."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core import rotation
from trimtab.core.journal import Journal, sync, write_json
from trimtab.core.rotation import Fused
from trimtab.core.sharing import DONOR, PIECES, other_name
from trimtab.core.spec import Pass, Recipe, Step
from trimtab.core.types import BadInput, Change, Site
from trimtab.methods.basis import Basis
from trimtab.methods.books import Books, widths
from trimtab.methods.codes import LEVELS, Codes, Grid, length, nearest, rounded
from trimtab.methods.composite import based, stacked, summed
from trimtab.methods.edit.share import OWN, adapted
from trimtab.methods.entrywise import Entrywise, ranks_of
from trimtab.methods.factors import Factors, checked_rank, rank_of
from trimtab.methods.format.book import book
from trimtab.methods.format.dense import dense
from trimtab.methods.format.lowrank import lowrank
from trimtab.methods.format.panels import VECTORS, Packed
from trimtab.methods.format.sell import sell
from trimtab.methods.gates import Gate, met_gated
from trimtab.methods.rounding import Rounding, met_rounded
from trimtab.methods.terms import ALONE, Terms, of_site
from trimtab.network import graph
from trimtab.network.checkpoint import (
    PACKED,
    SHARED,
    Entry,
    SafeFile,
    copy_others,
    finite,
    read,
    write_safetensors,
    write_sharded,
)
from trimtab.network.stream import Layer, Network
from trimtab.runtime.layouts import VERSION, describe
from trimtab.runtime.packed import DECODER, sealed

AS_RECIPE = "recipe"  # --pack without a format
ROWS = 4096           # of the head, rounded together
FEW = 0.25            # kept: fewer single weights take the kernels less time as `sell` than as `bitmask` (docs/speed.md)
SMALL = 256           # bytes: what is less is stored again in no more room than it takes to say where it lies
PART = "trimtab:"     # how a block of the journal marks what is no tensor of the checkpoint


# ---- formats ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Format:
    """How a site is stored; `named` by the user, or else what its pattern is made for."""

    step: Step
    named: bool = False

    @property
    def holds(self) -> str:
        return str(self.step.method.facts["holds"])

    def of(self, change: Change) -> Step:
        """Single weights that nobody named a format for lie in steps where few are left; a weight that was left whole, whole."""
        factored = Entrywise.among(change.parts) if self.holds == "entrywise" else Terms.among(change.parts)
        if not self.named and self.holds in ("factors", "entrywise") and factored is None:
            return Step("format/dense")
        if self.named or self.step != Step("format/bitmask") or Codes.among(change.parts) is not None:
            return self.step
        return Step("format/sell") if int(change.w.count_nonzero()) < FEW * change.w.numel() else self.step


def of_unit(p: Pass, step: Step) -> Step:
    """The format with those knobs of the unit that it has, and its own."""
    shared = {k: v for k, v in p.steps["unit"].bound.items() if k in step.method.knobs} if "unit" in p.steps else {}
    return Step(step.key, tuple(sorted({**shared, **dict(step.knobs)}.items())))


def codes_of(p: Pass) -> str:
    """The type of the codes that a pass leaves; of none nothing."""
    grid, own = p.steps.get("grid"), p.steps["edit"].method.facts["codes"]
    return grid.method.facts["type"](grid.bound) if grid else own if isinstance(own, str) else ""


def format_of(passes: Iterable[Pass], asked: str = "") -> Format:
    """How a site is stored that these passes went over: as `asked`, or the last format named, or the one made for factors, for books or for
    the last pattern, or dense where that does not store the codes that the site has."""
    found, named, codes, gated = Step("format/dense"), False, "", False
    for p in passes:
        gated |= p.gates
        if p.steps["edit"].method.facts["spares"] or (p.gates and not asked):
            continue
        codes = codes_of(p) or codes
        if asked and "unit" in p.steps:
            found, named = of_unit(p, Step(f"format/{asked}")), True
        elif asked:
            found, named = found if named else Step(f"format/{asked}"), True
        elif "format" in p.steps:
            found, named = of_unit(p, p.steps["format"]), True
        elif "unit" in p.steps and not named:
            found = of_unit(p, Step(f"format/{p.steps['unit'].method.facts['format']}"))
        elif (factors := p.steps["edit"].method.facts["factors"]) and not named:
            found = Step(f"format/{'lowrank' if factors is True else factors}")
        elif p.steps["edit"].method.facts["books"] and not named:
            found = Step("format/book")
    if gated and not named and found == Step("format/dense"):
        found = Step("format/columns")  # what is not computed is not read
    fits = named or not codes or codes in found.method.facts["codes"]
    return Format(found, named) if fits else Format(Step("format/dense"))


def value_dtype(stored: torch.dtype, asked: str | None = None) -> torch.dtype:
    """What a weight is packed in that is no codes: `asked`, or what takes no more bytes than the files do."""
    return getattr(torch, asked) if asked else torch.float32 if stored.itemsize >= 4 else torch.bfloat16


def has_codes(recipe: Recipe) -> bool:
    return any(map(rounds, recipe.passes))


def rounds(p: Pass) -> bool:
    """Whether a pass leaves codes or books, which no later pass could keep."""
    return "edit" in p.steps and any(p.steps["edit"].method.facts[k] for k in ("codes", "books"))


def try_format(how: Format, passes: list[Pass], shape: tuple[int, int], keep: float) -> None:
    """BadInput if a site of this shape cannot be stored so; found on noise, before anything is written."""
    w = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    mask = torch.ones(shape, dtype=torch.bool)
    change = Change(w.bfloat16())
    for p in passes:
        if p.steps["edit"].method.facts["spares"]:
            kept = p.steps["unit"].method({"s": w, "keep": p.keep or keep}, **p.steps["unit"].bound)
            p.steps["edit"].method({"w": w, "mask": kept}, **p.steps["edit"].bound)
            w = w[:, ~kept.all(0)]
            mask, change = torch.ones_like(w, dtype=torch.bool), Change(w.bfloat16())
            continue
        if "unit" in p.steps:
            unit = p.steps["unit"]
            mask &= unit.method({"s": w * mask, "keep": p.keep or keep}, **unit.bound)
            change = Change((w * mask).bfloat16(), mask=mask)
        if "grid" in p.steps:
            grid = p.steps["grid"]
            stats = {n: torch.ones(w.shape[1]) for n in grid.method.needs}
            fitted = grid.method({"w": w * mask, **stats}, **grid.bound)
            change = rounded(w * mask, fitted, length(grid.bound["group"], w.shape[1])).change(change.mask)
        if p.steps["edit"].method.facts["factors"]:
            rank = rank_of((len(w), w.shape[1]), p.keep or keep, p.steps["edit"].bound["rank"])
            some = [Factors(w[:, :r], w[:r]) for r in (rank, *ranks_of(max(2, rank)))]
            change = Change(change.w, (some[0] if p.steps["edit"].method.facts["factors"] is True else Entrywise(*some[1:])).parts())
        if p.steps["edit"].method.facts["books"]:
            change = some_books(w, p.steps["edit"].bound).change()
        for knobs in (r.bound for r in p.repairs if "rank" in r.bound):
            checked_rank(w.shape, knobs["rank"])
        if "input" in p.steps:
            seen = {n: torch.ones(2, w.shape[1]) for n in ("sample", "absmax")}
            for step in (p.steps[a] for a in ("rewrite", "input") if a in p.steps):  # knobs that say nothing are found here
                if set(step.method.data) <= seen.keys():
                    last = step.method(seen, **step.bound)
            change = replace(change, parts={**change.parts, **last.parts()})
    pack(how, change, "")


def some_books(w: Tensor, knobs: Mapping[str, Any]) -> Books:
    """Books of the shape of w [out, in], whatever they hold. BadInput for knobs that make none."""
    vector = knobs["vector"]
    widths(vector, knobs["bits"], knobs["residual"])
    index = torch.zeros(-(-len(w) // vector), w.shape[1], dtype=torch.uint8)
    return Books(index, torch.ones(2, vector).half(), torch.ones(len(w)).half())


def valued(how: Format, change: Change, dtype: torch.dtype | None = None) -> Change:
    """What is packed of a site: codes as they are, else values of `dtype`, or that take no more bytes than those of its weight."""
    dtype, terms, gate = dtype or value_dtype(change.w.dtype), Terms.among(change.parts), Gate.among(change.parts)
    gated = gate.parts() if gate else {}
    if how.holds == "entrywise" and (products := Entrywise.among(change.parts)) is not None:
        return Change(change.w, {**products.to(dtype).parts(), **gated})
    kind = None if terms is None or not terms.simple or terms.codes is not None else "factors" if terms.factors is not None else "books"
    if terms is None or (kind is not None and how.holds != kind):
        return Change(change.w.to(dtype), gated, change.mask)
    if terms.codes is None and terms.books is None and terms.factors is not None:
        terms = replace(terms, factors=terms.factors.to(dtype))
    rounding = Rounding.among(change.parts)
    return Change(change.w, {**terms.parts(), **(rounding.parts() if rounding else {}), **gated}, change.mask)


# ---- layers -----------------------------------------------------------------------------------
def whole(layer: Layer, w: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype, how: Format) -> Change:
    """A layer's change, from its weight [out, in] and the parts of its sites, which may be rows of it.

    Codes where all its sites have them on one grid, all the terms of a site that has a weight of its own, else the weight in `dtype`;
    what was dropped is zero in all.
    """
    only = layer.sites[0]
    if len(layer.sites) == 1 and only.rows is None:
        return valued(how, Change(w, of_site(parts, only.name)), dtype)
    if any(f"{s.name}:{k}" in parts for s in layer.sites for k in ALONE):
        return Change(w.to(dtype))

    def merged(part: str) -> Tensor | None:
        have = [parts.get(f"{s.name}:{part}") for s in layer.sites]
        out: Tensor | None = None
        for s, t in zip(layer.sites, have, strict=True):
            if t is None:
                return None
            out = torch.empty(len(w), *t.shape[1:], dtype=t.dtype) if out is None else out
            out[slice(None) if s.rows is None else s.row_index()] = t
        return out

    codes, scales = merged("codes"), merged("scales")
    tables = [parts.get(f"{s.name}:table") for s in layer.sites]
    grids = {(*parts[f"{s.name}:grid"].tolist(), f"{s.name}:zeros" in parts, str(None if t is None else t.tolist()))
             for s, t in zip(layer.sites, tables, strict=True)} if codes is not None else set()
    if len(grids) == 1 and codes is not None and scales is not None:
        levels, group, *_ = grids.pop()
        change = Codes(codes, Grid(scales, levels, merged("zeros"), tables[0]), group).change()
        its = [Rounding.among(of_site(parts, s.name)) for s in layer.sites]
        if (rounding := its[0]) is not None and all(r is not None and r.same(rounding) for r in its):
            change = replace(change, parts={**change.parts, **rounding.parts()})
        return change
    return Change(w.to(dtype))


def own_bytes(change: Change, share: float) -> int | None:
    """What a site takes that has the weights of another place: what is beside them, or a share of its rows. None where it has none."""
    own = {k.removeprefix(OWN): t for k, t in change.parts.items() if k.startswith(OWN)}
    if DONOR in change.parts:
        return (lowrank(Change(change.w, own)).nbytes if "left" in own else 0) + (own["scale"].nbytes if "scale" in own else 0)
    return round(share * change.w.numel() * value_dtype(change.w.dtype).itemsize) if PIECES in change.parts else None


def beside(layer: Layer, w: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype, steps: Mapping[str, Format], layers: Iterable[Layer],
           weight: Callable[[str], Tensor]) -> Packed | None:
    """A layer with the weights of another, which are packed as that one packs them, and what it has beside them. None for any other
    layer, and where later passes made something else of it."""
    its = [of_site(parts, s.name) for s in layer.sites]
    blocks = {int(p[DONOR]) if DONOR in p else -1 for p in its}
    name = other_name(layer.sites[0].name, min(blocks)) if layer.sites else ""
    other = next((x for x in layers if x.sites and x.sites[0].name == name), None)
    if len(blocks) != 1 or other is None or not any(k.startswith(OWN) for p in its for k in p):
        return None
    base, out = weight(other.file), len(w)
    new, scale = torch.empty(w.shape), torch.ones(out)
    left, right = list[Tensor](), list[Tensor]()
    for s, p in zip(layer.sites, its, strict=True):
        rows = slice(None) if s.rows is None else s.row_index()
        new[rows] = adapted(base[rows], p)
        scale[rows] = p.get(f"{OWN}scale", scale[rows])
        if f"{OWN}left" in p:
            mine = p[f"{OWN}left"].new_zeros(out, p[f"{OWN}left"].shape[1])
            mine[rows] = p[f"{OWN}left"]
            left, right = [*left, mine], [*right, p[f"{OWN}right"]]
    if not torch.equal(new.to(w.dtype), w):
        return None
    maps = [stored(steps[name], Change(base.to(dtype)))]
    maps += [lowrank(Factors(torch.cat(left, 1), torch.cat(right)).change())] if left else []
    return based(summed(*maps), w.shape[1], outside=Basis(1 / scale) if bool((scale != 1).any()) else None)


def pieces(layer: Layer, parts: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Rows of a layer that other layers may have, each run of them; none where it is stored as a whole."""
    at, cuts = 0, {0}
    for s in layer.sites:
        its, rows = of_site(parts, s.name), (0, s.shape[0]) if s.rows is None else s.rows
        if len(rows) != 2 or rows[0] != at or Terms.among(its) is not None or Gate.among(its) is not None:
            return []
        at = rows[1]
        cuts |= {rows[0] + n for n in its[PIECES].tolist()} if PIECES in its else {at}
    return list(pairwise(sorted(cuts))) if len(cuts) > 2 and any(f"{s.name}:{PIECES}" in parts for s in layer.sites) else []


def pack_layer(layer: Layer, w: Tensor, parts: Mapping[str, Tensor], dtype: torch.dtype, steps: Mapping[str, Format]) -> Packed:
    """A layer as a kernel reads it: its sites in one, or one after the other where their gates differ."""
    if some := pieces(layer, parts):
        return stacked(*(pack(steps[layer.sites[0].name], Change(w[a:b].to(dtype)), layer.name) for a, b in some))
    gates = [Gate.among(of_site(parts, s.name)) for s in layer.sites]
    first = gates[0]
    if all(first.same(g) if first else g is None for g in gates):
        same = {steps[s.name] for s in layer.sites}
        how = same.pop() if len(same) == 1 else Format(Step("format/dense"))
        change = whole(layer, w, parts, dtype, how)
        return pack(how, replace(change, parts={**change.parts, **(first.parts() if first else {})}), layer.name)
    rows = [torch.arange(len(w))[s.row_index()] for s in layer.sites]
    if not torch.equal(torch.cat(rows), torch.arange(len(w))):
        raise BadInput(f"{layer.name}: its {len(rows)} sites lie in one another and have gates of their own, which is not packed; give "
                       "them one gate, such as gate_magnitude with one share")
    each = [pack(steps[s.name], valued(steps[s.name], Change(w[r], dict(of_site(parts, s.name))), dtype), s.name)
            for s, r in zip(layer.sites, rows, strict=True)]
    return stacked(*each)


def pack(how: Format, change: Change, name: str) -> Packed:
    """The change as a kernel reads it: what `how` makes of its codes, factors, books or weight, and around and beside it the rest."""
    try:
        terms, rounding, gate = Terms.among(change.parts), Rounding.among(change.parts), Gate.among(change.parts)
        alone = terms is None or terms.simple
        made = met_rounded(stored(how, change), rounding) if alone or terms is None else composed(how, change, terms, rounding)
        return met_gated(made, gate)
    except BadInput as e:
        raise BadInput(f"{name}: {e}" if name else str(e)) from None


def stored(how: Format, change: Change) -> Packed:
    step = how.of(change)
    return step.method({"new": change}, **step.bound)


def composed(how: Format, change: Change, terms: Terms, rounding: Rounding | None) -> Packed:
    """Maps that are added: the codes in their basis with the factors beside them, the columns that were spared, and single entries."""
    spared, inputs = terms.spared, change.w.shape[1]
    others = None if spared.columns is None else spared.others(inputs)
    inner = []
    if terms.codes is not None and terms.transposed:
        inner.append(by_outputs(terms.codes))
    elif terms.codes is not None:
        mask = None if change.mask is None or others is None else change.mask[:, others]
        inner.append(met_rounded(stored(how, terms.codes.change(change.mask if others is None else mask)), rounding))
    if terms.factors is not None:
        inner.append(lowrank(terms.factors.change()))
    if terms.books is not None:
        inner.append(book(terms.books.change()))
    taken = None if others is None else others.nonzero()[:, 0].int()
    maps = [based(summed(*inner), inputs, taken, terms.inside, terms.outside)]
    if spared.columns is not None and spared.codes is not None:
        maps.append(based(dense(spared.codes.change()), inputs, spared.columns))
    if spared.entries is not None and spared.at is not None:
        narrow = spared.entries.bfloat16()  # where nothing is lost by it
        entries = narrow if torch.equal(narrow.float(), spared.entries) else spared.entries
        single = torch.zeros(change.w.shape, dtype=entries.dtype, device=entries.device)
        maps.append(sell(Change(single.index_put_((spared.at[:, 0], spared.at[:, 1]), entries))))
    return summed(*maps)


def by_outputs(codes: Codes) -> Packed:
    """Codes [in, out] in groups of outputs: of every group a map with a scale of one, whose inputs take the group's own scales."""
    maps = []
    for g, rows in enumerate(codes.codes.T.split(codes.group)):
        ones = torch.ones(len(rows), 1, device=rows.device)
        scale = codes.grid.scales[:, g].float()
        grid = replace(codes.grid, scales=ones)
        inner = dense(Codes(rows.contiguous(), grid, rows.shape[1]).change())
        maps.append(based(inner, rows.shape[1], inside=Basis(torch.where(scale == 0, 1e-30, scale))))
    return stacked(*maps)


def head_in_int8(recipe: Recipe, head: str | None) -> bool:
    """Whether the head is stored in int8 per row: asked for, or not refused where the recipe leaves codes."""
    return head == "int8" or (head is None and has_codes(recipe))


def to_pack(net: Network, recipe: Recipe, head: str | None) -> list[Layer]:
    """The layers that are packed: all plain ones of the blocks, and the head, unless it is the table of embeddings as it is."""
    return [x for x in net.layers() if not x.is_head or not net.tied_head or head_in_int8(recipe, head)]


def in_int8(w: Tensor, scale: Tensor | None = None) -> Codes:
    """A large matrix, its inputs times `scale`, in int8 per row, some rows at a time: as float32 it would be the largest of all."""
    some = [nearest(rows.float() if scale is None else rows.float() * scale, 8) for rows in w.split(ROWS)]
    return Codes(torch.cat([c.codes for c in some]), Grid(torch.cat([c.grid.scales for c in some]), 256), w.shape[1])


# ---- the directory ----------------------------------------------------------------------------
def stage(path: Path, packed: Mapping[str, Packed]) -> None:
    """Packed layers in a file of their own, with what describes them; atomically."""
    buffers = {f"{name}{PACKED}{k}": t for name, p in packed.items() for k, t in p.buffers.items()}
    about = {"linears": {n: describe(p) for n, p in packed.items()}, "labels": {n: p.label for n, p in packed.items()}}
    tmp = path.with_suffix(".tmp")
    write_safetensors(tmp, {n: (t.dtype, tuple(t.shape)) for n, t in buffers.items()}, buffers.__getitem__,
                      lambda sums: {k: json.dumps(v) for k, v in {**about, "sha256": sums}.items()})
    sync(tmp)
    os.replace(tmp, path)


def write_packed(net: Network, recipe: Recipe, journal: Journal, last: int, out: Path, *, asked: str, dtype: str | None,
                 head: str | None, tick: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Fill the directory `out` from the network's files and the journal's blocks of sweep `last` (-1: nothing was edited).

    Returns the notes: packed_bytes and formats (label) by layer, shared_bytes, which are not stored again, and warnings. One block is in
    memory at a time.
    """
    edited: dict[str, Path] = {}
    for i in range(net.n_blocks) if last >= 0 else ():
        path = journal.block_path(last, i)
        edited |= {n: path for n in SafeFile(path).names if not n.startswith(PART)}
    steps = formats(net.sites, recipe, asked)

    def weight(name: str) -> Tensor:
        return SafeFile(edited[name]).read(name) if name in edited else net.checkpoint.read(name)

    def of_block(i: int, wanted: Iterable[str]) -> dict[str, Tensor]:
        """Parts of a block, by `<site>:<part>`, those of these names that there are."""
        f = SafeFile(journal.block_path(last, i)) if last >= 0 else None
        return {n: f.read(PART + n) for n in wanted if f and PART + n in f.entries}

    layers = to_pack(net, recipe, head)
    shared = last >= 0 and any(p.shares for p in recipe.passes)
    fused = rotation.fused(net, of_block, weight, not net.tied_head or any(x.is_head for x in layers)) if shared else Fused()

    def as_quantised(layer: Layer, w: Tensor) -> Change | None:
        """The codes another program made of the weight, if it is still what they say."""
        codes = net.checkpoint.decoded(layer.file)
        return codes.change() if isinstance(codes, Codes) and torch.equal(codes.weight().to(w.dtype), w) else None

    def packed(some: list[Layer], parts: Mapping[str, Tensor]) -> dict[str, Packed]:
        made = {}
        for layer in some:
            w = weight(layer.file)
            if not finite(w):
                raise BadInput(f"{layer.name}: a weight is NaN or inf; only finite weights can be packed")
            values = value_dtype(w.dtype, dtype)
            again = layer.is_head and (head == "int8" or fused.last is not None)
            if (codes := None if again else as_quantised(layer, w)) is not None:
                made[layer.name] = pack(Format(Step("format/dense")) if layer.is_head else steps[layer.sites[0].name], codes, layer.name)
            elif layer.is_head:
                plain = w if fused.last is None else w * fused.last
                inner = dense(Change(w, in_int8(w, fused.last).parts()) if head_in_int8(recipe, head) else Change(plain.to(values)))
                made[layer.name] = based(inner, w.shape[1], inside=fused.head)
            elif not shared and (own := beside(layer, w, parts, values, steps, layers, weight)) is not None:
                made[layer.name] = own
            else:
                made[layer.name] = pack_layer(layer, fused.weight(layer, w, parts), parts, values, steps)
        return made

    staged: list[SafeFile] = []
    for i in range(net.n_blocks + 1):
        mine = [x for x in layers if (x.is_head if i == net.n_blocks else not x.is_head and x.sites[0].block == i)]
        path = journal.dir / f"packed{i:05d}.safetensors"
        if mine and not path.exists():
            f = SafeFile(journal.block_path(last, i)) if last >= 0 and i < net.n_blocks else None
            names = {s.name for x in mine for s in x.sites}
            wanted = [n.removeprefix(PART) for n in f.names if n.startswith(PART)] if f else []
            stage(path, packed(mine, fused.parts({n: f.read(PART + n) for n in wanted if f and n.rpartition(":")[0] in names})))
        if mine:
            staged.append(SafeFile(path))
        tick("pack", i + 1, net.n_blocks + 1)

    linears, labels = ({k: v for f in staged for k, v in json.loads(f.metadata[what]).items()} for what in ("linears", "labels"))
    untied = net.tied_head and any(x.is_head for x in layers)
    gone = {f"{x.name}.weight" if x.is_head and net.tied_head else x.file for x in layers}
    # A table that is stored under the name of the head alone gets its own.
    alone = [x.file for x in layers if x.is_head and net.tied_head and x.file in gone]
    moved = {net.table: alone[0]} if alone else {}
    buffers, repeated = written_once(staged)
    entries = {n: (e.dtype, e.shape) for n, e in buffers.items()}
    stay = {n: n for n in net.checkpoint.tensors if n not in gone and not net.unread(n)} | moved
    entries |= {n: (net.checkpoint.tensors[was].dtype, net.checkpoint.tensors[was].shape) for n, was in stay.items()}

    def tensor(name: str) -> Tensor:
        return read(buffers[name]) if name in buffers else fused.tensor(stay[name], weight(stay[name]))

    def about(sums: dict[str, str]) -> dict[str, str]:
        return {"format": "pt", "trimtab": json.dumps({"version": VERSION, "sha256": sums}, sort_keys=True)}

    tick("write", 0, 1)
    files = write_sharded(out, entries, tensor, about)
    copy_others(net.checkpoint, out, without=("config.json",))
    config = {**net.checkpoint.config, **({"tie_word_embeddings": False} if untied else {}),
              "quantization_config": {"quant_method": "trimtab", "version": VERSION, "linears": linears,
                                      **({SHARED: repeated} if repeated else {})}}
    if (description := description_of(net)) is not None:
        write_json(out / DECODER, description)
    write_json(out / "config.json", sealed(out, files, config))
    sizes = {name: sum(buffers[b].end - buffers[b].begin for b in buffers if b.rpartition(PACKED)[0] == name) for name in linears}
    again = sum(buffers[n].end - buffers[n].begin for n in repeated.values())
    return {"packed_bytes": sizes, "shared_bytes": again, "formats": labels, "warnings": told(net, layers, linears, dtype) + told_of(fused)}


def written_once(staged: Iterable[SafeFile]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The buffers of packed layers, each that is the same byte by byte once, and by the names of the others what they share."""
    buffers: dict[str, Entry] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for f in staged:
        sums = json.loads(f.metadata["sha256"])
        for n, e in f.entries.items():
            same = first.setdefault((sums[n], e.dtype, e.shape), n) if e.end - e.begin >= SMALL else n
            if same != n:
                shared[n] = same
            else:
                buffers[n] = e
    return buffers, shared


def description_of(net: Network) -> dict[str, Any] | None:
    """What the decoder executes, as data, for decoder.json; None for a network that it does not run."""
    if net.kind != "lm":
        return None
    try:
        return graph.describe(net.family, net.checkpoint.config)
    except BadInput:
        return None


def told_of(fused: Fused) -> list[str]:
    return [f"the rotation of the residual stream costs time in every layer: {fused.why_not}"] if fused.why_not else []


def told(net: Network, layers: list[Layer], linears: Mapping[str, Any], dtype: str | None) -> list[str]:
    """What the user should know of how it was packed."""
    packed = {s.name for x in layers for s in x.sites}
    lines = []
    unordered = [x.name for x in layers if (q := net.checkpoint.quantized.get(x.file.removesuffix(".weight"))) and q.order is not None]
    if unordered:
        names = ", ".join(unordered[:3]) + ", ..." * (len(unordered) > 3)
        lines.append(f"{len(unordered)} layers ({names}) have groups of inputs that do not follow each other (act_order): they are "
                     "stored as plain weights")
    if left := [s.name for s in net.sites if s.name not in packed]:
        names = ", ".join(left[:3]) + ", ..." * (len(left) > 3)
        lines.append(f"{len(left)} sites ({names}) are no plain linear layers and stay ordinary tensors")
    values = [x.file for x in layers if linears[x.name]["type"] not in {*LEVELS, VECTORS}]
    if dtype is None and any(net.checkpoint.tensors[n].dtype == torch.float16 for n in values):
        lines.append("float16 weights are rounded to bfloat16, which kernels read; --pack-dtype float32 keeps every bit")
    return lines


def formats(sites: list[Site], recipe: Recipe, asked: str) -> dict[str, Format]:
    """The format of every site; dense where no pass went over it, and where its factors or books are those of some rows of a weight."""
    if len(each := recipe.options) > 1:  # one that stores whatever is chosen
        first, *others = [formats(sites, one, asked) for one in each]
        return {n: how if all(o[n] == how for o in others) else Format(Step("format/dense")) for n, how in first.items()}
    found = {s.name: format_of([p for p in recipe.passes if p.covers(s)], asked) for s in sites}
    some = [s for s in sites if s.rows is not None and found[s.name].holds in ("factors", "books")]
    return found | {s.name: Format(Step("format/dense")) for s in some}


def rank_left(p: Pass, site: Site, change: Change) -> int | None:
    """The rank of the factors that a pass left; of a weight that it could have made factors of and left whole, the shorter side."""
    factors = Factors.among(change.parts) or Entrywise.among(change.parts)
    whole = min(site.shape) if p.steps["edit"].method.facts["factors"] else None
    return whole if factors is None else factors.rank


def ranked(ranks: Mapping[str, int], sites: list[Site]) -> dict[str, Any]:
    """What a run says of these sites' ranks: each, and the share of the sites' parameters that is in the factors; nothing of none."""
    some = [s for s in sites if s.name in ranks]
    share = sum(min(ranks[s.name] * sum(s.shape), s.size) for s in some) / max(1, sum(s.size for s in some))
    return {"ranks": dict(sorted(ranks.items())), "factored_share": share} if some else {}
