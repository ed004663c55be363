"""The places of a network that options are chosen for, and the recipe that a choice comes to."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from trimtab.core import line
from trimtab.core.spec import Pass, Recipe
from trimtab.core.types import BadInput
from trimtab.network import graph
from trimtab.network.stream import Network
from trimtab.search.options import ATTN, DENSE, DROP, HEAD, MADE, MLP, OPTIONS, Option, Whole

Choices = Mapping[str, str]  # option by place
KEEP, INT8 = "keep", "int8"  # what the head may be


@dataclass(frozen=True)
class Place:
    """A sublayer, "<block>.attn" or "<block>.mlp", and what it may become, by name."""

    name: str
    block: int
    group: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """`even`: blocks go whole, and those that stay have one shape, as programs open them that know of no other networks."""

    blocks: int
    places: tuple[Place, ...]
    heads: tuple[str, ...] = (KEEP, INT8)
    even: bool = False

    @property
    def names(self) -> list[str]:
        return [p.name for p in self.places]

    @property
    def dense(self) -> dict[str, str]:
        return {p.name: DENSE for p in self.places} | {HEAD: KEEP}

    def only(self, options: Iterable[str]) -> Space:
        """The space with these options alone, beside leaving a sublayer as it is."""
        some = {DENSE, *options}
        return replace(self, places=tuple(replace(p, options=tuple(o for o in p.options if o in some)) for p in self.places))

    def made(self, whole: Whole) -> Space:
        """The same with codes made so."""
        return replace(self, places=tuple(replace(p, options=tuple(MADE.get((o, whole), o) for o in p.options)) for p in self.places))

    def uniform(self, name: str) -> dict[str, str]:
        """One option wherever it fits, everything else as it is."""
        return self.allowed({p.name: name if name in p.options else DENSE for p in self.places} | {
            HEAD: INT8 if "int" in name and INT8 in self.heads else KEEP})

    def allowed(self, choices: Choices) -> dict[str, str]:
        """The same, or what is nearest to it of what `even` allows: a block goes where its attention does, and the shape of a group is that
        of its first block that stays."""
        if not self.even:
            return dict(choices)
        gone = {p.block for p in self.places if p.group == ATTN and choices[p.name] == DROP}
        gone = gone if len(gone) < self.blocks else set()
        new, shape = dict(choices), dict[str, str]()
        for p in self.places:
            o = DENSE if choices[p.name] == DROP else choices[p.name]
            same = [x for x in p.options if shape_of(x) == shape.setdefault(p.group, shape_of(o))] if p.block not in gone else []
            new[p.name] = DROP if p.block in gone else o if o in same else same[0]
        return new

    def checked(self, choices: Choices) -> dict[str, str]:
        """A choice for every place. BadInput for a place or an option that is not there."""
        known = {p.name: p.options for p in self.places} | {HEAD: self.heads}
        for place, option in choices.items():
            if option not in known.get(place, ()):
                raise BadInput(f"{place}: no option is called {option!r} there; it has {', '.join(known.get(place, ('none',)))}")
        return {**self.dense, **choices}


def space_of(net: Network, options: Iterable[Option]) -> Space:
    """What of these options the network can take, tried on its shapes alone."""
    groups = {(s.block, s.group) for s in net.sites}
    fits = {g: tuple(o.name for o in options if g in o.groups and takes(net, o, g)) for g in (ATTN, MLP)}
    places = tuple(Place(f"{i}.{g}", i, g, fits[g]) for i in range(net.n_blocks) for g in (ATTN, MLP) if (i, g) in groups)
    return Space(net.n_blocks, places)


def takes(net: Network, option: Option, group: str) -> bool:
    """Whether the sublayers of a group can become this, and be packed as it."""
    if option.name == DROP and not graph.can_skip(net.family, net.config):
        return False
    recipe = Recipe(option.name, tuple(scoped(p, [f"*.{group}.*"]) for p in option.passes))
    try:
        line.check_parts(net, recipe, line.Options(pack=line.pack.AS_RECIPE))
    except BadInput:
        return False
    return True


def shape_of(option: str) -> str:
    """What takes parts of a sublayer away, as text: options that say the same leave one shape."""
    return " ; ".join(str(p) for p in OPTIONS[option].passes if p.shapes)


def scoped(p: Pass, scope: Iterable[str]) -> Pass:
    """A pass of an option at some sublayers; a scope of its own stays beside theirs."""
    where = ",".join(scope)
    if where == f"{ATTN},{MLP}":  # everything
        return p
    return replace(p, scope=f"{where}&{p.scope}" if p.scope else where)


def recipe_of(space: Space, choices: Choices, *, quick: bool = False) -> Recipe:
    """The recipe of a choice: what takes parts away first, then the rest, in the numbers that blocks have by then. Equal passes are one.
    `quick`: of the same layout and shapes, soon made.

    BadInput where nothing would be left of the network.
    """
    taken = space.checked(choices)
    gone = {i for i in range(space.blocks) if all(taken[p.name] == DROP for p in space.places if p.block == i)}
    if len(gone) == space.blocks:
        raise BadInput("every sublayer is dropped, and nothing is left of the network; keep one block")
    number = {i: k for k, i in enumerate(i for i in range(space.blocks) if i not in gone)}
    passes: dict[tuple[bool, int, str], tuple[Pass, list[str]]] = {}  # equal ones are one, over all their sublayers
    for place in space.places:
        for k, p in enumerate(OPTIONS[taken[place.name]].quickly if quick else OPTIONS[taken[place.name]].passes):
            name = place.name if p.shapes else f"{number[place.block]}.{place.group}"
            p = replace(p, order="dense") if quick else p
            passes.setdefault((not p.shapes, k, str(p)), (p, []))[1].append(name)
    left = [f"{number[p.block]}.{p.group}" for p in space.places if taken[p.name] != DROP]
    each = [scoped(p, _short(names, space.names if p.shapes else left)) for _, (p, names) in sorted(passes.items(), key=lambda i: i[0][:2])]
    return Recipe("search", tuple(each))


def _short(names: list[str], every: list[str]) -> list[str]:
    """As few words as say which sublayers: whole groups by their name."""
    words: list[str] = []
    for group in (ATTN, MLP):
        mine = [n for n in names if n.endswith(f".{group}")]
        whole = mine and len(mine) == sum(n.endswith(f".{group}") for n in every)
        words += [group] if whole else [f"{n}.*" for n in mine]
    return words
