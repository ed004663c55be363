"""One decorator. The signature is the declaration: positional names are data, keyword-only names are knobs."""
from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from trimtab.core.types import BadInput

AXES = ("stat", "wiring", "unit", "score", "budget", "rewrite", "grid", "gate", "edit", "repair", "input", "format")
# Positional names an axis may ask for besides registered statistics.
DATA: dict[str, set[str]] = {
    "stat": {"x", "y", "g"},
    "wiring": {"mlps", "apart", "writes", "mlp", "keep", "embed", "head", "damage", "sizes", "means"},
    "unit": {"s", "keep", "heads"},
    "score": {"w", "heads", "depth"},
    "budget": {"scores", "target", "options", "trial", "spectra", "ranking"},
    "rewrite": {"w", "grid", "rounded"},
    "grid": {"w"},
    "gate": {"w", "keep", "heads"},
    "edit": {"w", "keep", "mask", "unit", "grid", "gate", "feeders", "act", "other"},
    "repair": {"w", "new", "net"},
    "input": set(),
    "format": {"new"},
}
# A knob name means one thing everywhere; a new one is added here first.
KNOBS = {
    "n": "kept entries of a group of m", "m": "length of a group along the input",
    "dim": "which dimension a pattern runs along: in or out",
    "b": "side of a square block", "rows": "rows of a block", "cols": "columns of a block",
    "damp": "ridge, as a share of the mean diagonal unless the method says otherwise",
    "block": "entries handled together by a blocked solver",
    "alpha": "exponent of an activation norm", "scale": "weight of a second term",
    "outlier": "multiple of the mean above which a score, or the size of a token, is an outlier",
    "spread": "half-width of a window of shares",
    "iters": "iterations", "steps": "how many values are tried",
    "step": "share of the weights of a block that is dropped at a time",
    "rho": "penalty of an augmented Lagrangian", "ramp": "iterations over which a mask hardens",
    "ridge": "weight of the distance from the dense weights", "seed": "seed of the generator",
    "bits": "bits of a code", "act_bits": "bits that inputs are rounded to where they meet codes",
    "group": "inputs that share a scale, 0 for the whole row",
    "asymmetric": "whether a grid has a zero point of its own",
    "centred": "whether inputs are moved to lie around zero, where biases can take it",
    "clip": "how the range of a grid is chosen: max, mse, percentile, entropy or rms",
    "percentile": "share of the weights of a group whose range is kept",
    "exponent": "bits of a small floating point number's exponent, -1: searched",
    "act_order": "whether the inputs of the largest second moment are decided first",
    "feedback": "whether what rounding a column costs is mended in those to come",
    "whiten": "whether nearness is that of the outputs, not of the weights", "limit": "score from which on a unit is chosen",
    "mean": "bits a weight on average, scales and zero points included",
    "source": "directory that an earlier run wrote, whose ranking is taken in place of training",
    "rank": "rank of a product of factors, 0 for what the share of parameters allows",
    "vector": "outputs that share an index into a codebook",
    "energy": "share of a second moment that is kept, 0 for what the share of parameters allows",
    "residual": "bits a weight of a second codebook, for what the first one leaves, 0 for none",
    "single": "bits of a single weight that is spared, 0 for as it is",
    "tol": "stop when the relative change is below", "order": "sequential or dense calibration", "keep": "share kept",
    "lr": "learning rate", "epochs": "how often training sees every sample",
    "accumulate": "samples whose gradients make one update",
    "batch": "sequences of a step, at most", "recall": "share of what is active that is to be found",
    "prompt": "tokens of a sentence that decide for those behind them", "clusters": "kinds of sentences",
    "multiple": "what a number of neurons is a multiple of",
    "scaled": "whether what is left makes up for the size of what went",
    "refit": "whether the map behind is solved for again",
    "feeders": "whether the scores of what makes an input count as well",
    "exact": "whether every token keeps as many, and not as many as pass a threshold",
    "config": "config.json whose sizes a network is to have, or a directory with one",
    "near": "whether places share that follow each other alone", "tried": "whether what is lost is tried on calibration text",
    "layers": "blocks of a network", "width": "channels of the residual stream", "neurons": "hidden neurons of an MLP",
    "experts": "hidden neurons of an expert", "shared": "hidden neurons of the shared expert",
    "parts": "experts that an MLP becomes, those that every token meets included", "active": "experts that a token meets",
    "always": "parts of an MLP that every token meets", "split": "how hidden neurons are split: coactive, weights, order or random",
    "share": "share that is rewired", "by": "what decides which are rewired: damage, as it is measured, first or last",
    "length": "members of a run at most, 0 for all",
    "dependency": "how much what follows may depend on what it is fused with, a cosine distance, 0 for however much",
    "heads": "query heads of an attention", "kv_heads": "key and value heads of an attention",
}
# Declared beside a method, and nothing of what it computes.
ASIDE = ("xfail", "codes", "format", "rescaled", "moved", "of_gram", "turned", "some", "into", "keeps", "leaves", "either", "rounded",
         "based")
SECTIONS = ("Formula", "Source", "Deviations")
_REG: dict[str, Method] = {}


@dataclass(frozen=True)
class Method:
    axis: str
    name: str
    fn: Callable[..., Any]
    data: tuple[str, ...]              # positional names, in order
    needs: tuple[str, ...]             # those of them that are statistics
    knobs: dict[str, Any]              # keyword-only names and defaults
    joint: tuple[str, ...] = ()        # further axes this method decides
    inverse: Callable[..., Any] | None = None  # formats: a packed weight -> [out, in]
    xfail: dict[str, str] = field(default_factory=dict)  # law -> reason, strict
    facts: dict[str, Any] = field(default_factory=dict)  # what the axis declares: see FACTS

    @property
    def key(self) -> str:
        return f"{self.axis}/{self.name}"

    @property
    def doc(self) -> dict[str, str]:
        return sections(self.fn)

    @property
    def version(self) -> str:
        """Hash of its source, comments and all but for docstrings, and of what it draws on in the method files."""
        return _version(self.fn.__module__, self.fn.__name__)

    def __call__(self, env: dict[str, Any], **knobs: Any) -> Any:
        """Call with the data it names taken from `env`."""
        return self.fn(*(env[d] for d in self.data), **{**self.knobs, **knobs})


@cache
def _definitions(module: str) -> tuple[str, dict[str, ast.stmt], dict[str, tuple[str, str]]]:
    """Source of a module, what it defines at its top by name, and what it imports from other methods: (module, name) by name."""
    source = inspect.getsource(sys.modules[module])
    defined: dict[str, ast.stmt] = {}
    imported: dict[str, tuple[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {n.id: node for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trimtab.methods"):
            imported |= {a.asname or a.name: (node.module or "", a.name) for a in node.names}
    return source, defined, imported


def _text(source: str, node: ast.stmt) -> str:
    """The source of a definition without docstrings, and without what its decorator declares for others' sake."""
    lines = source.splitlines()
    for n in ast.walk(node):
        first = n.body[0] if isinstance(n, ast.FunctionDef | ast.ClassDef) else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            lines[first.lineno - 1:first.end_lineno] = [""] * ((first.end_lineno or 0) - first.lineno + 1)
    said = [ast.get_source_segment(source, k.value) or "" for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Call)
            for k in d.keywords if k.arg not in ASIDE]
    return "\n".join([*said, *(x for x in lines[node.lineno - 1:node.end_lineno] if x.strip())])


@cache
def _version(module: str, name: str) -> str:
    """Hash of a definition and of every definition of a method file that it draws on."""
    texts: dict[tuple[str, str], str] = {}
    todo = [(module, name)]
    while todo:
        at = todo.pop()
        source, defined, imported = _definitions(at[0])
        if at[1] in imported:
            todo.append(imported[at[1]])
        elif at[1] in defined and at not in texts:
            node = defined[at[1]]
            texts[at] = _text(source, node)
            todo += [(at[0], n.id) for n in ast.walk(node) if isinstance(n, ast.Name)]
    return hashlib.sha256("\n".join(f"{'.'.join(k)}\n{v}" for k, v in sorted(texts.items())).encode()).hexdigest()[:12]


# What a method may declare, by axis, with defaults.
FACTS: dict[str, dict[str, Any]] = {
    # of: which tensor it sees. input: x [tokens, in]; mid: x = the consumer's input, or the site's own where there is none;
    # grad: g [out, in] of one sequence; sublayer: x, y [tokens, width], the residual stream before and after; hidden: x, y [tokens, in], of
    # what comes after an MLP's gate the two that are multiplied, the gate activated first; fed: x [tokens, width], y [tokens, in], what a
    # sublayer is given and what the site that ends it is; sentence: x [tokens, in] of one sequence at a time.
    # merge: sum, max, stack or cat over batches; mean: divide a sum by the number of tokens (or sequences); done: last step.
    # rescaled: of (value, s [in]) what it is where every input was divided by s; of_gram: what it is, of the inputs' second moment
    # alone, which follows into any basis; turned: of (value, basis) what it is in it; None where that cannot be told.
    # some: of (value, bool [in]) what it is of some inputs alone; into: of (sum, batch), adds to the sum in place what it is of a batch,
    # from what it is of no tokens on.
    # moved: of (value, z [in], the inputs' mean) what it is where z was taken off every input; None where that cannot be told.
    "stat": {"of": "input", "merge": "sum", "mean": False, "done": None, "rescaled": None, "moved": None, "of_gram": None, "turned": None,
             "into": None, "some": lambda value, inputs: value[inputs]},
    # of: what it sees at a time, the name of a handler in core/rewire.py: a "run" of MLPs that nothing stands between, a tensor that writes
    # the residual "stream", the "axes" of that, one "mlp", the "table" of embeddings, what rewiring each "layer" or each "norm" costs;
    # looks: of the knobs whether that is told by calibration samples, beside the statistics it names; overlap: whether experts may have
    # neurons in common; ours: what our runtime alone computes so, as the proof says it of plain files.
    "wiring": {"of": "", "looks": None, "overlap": False, "ours": ""},
    # free: whether it honours the asked share; period: columns that must be decided together (a function of the knobs).
    # along: the dimension its groups run along; format: the storage made for its pattern; whole: whether it decides inputs as a whole;
    # ends: where it is a part of the network that goes with all its weights, the roles of the sites whose inputs say so; takes: all of a
    # "sublayer" or of a "layer", a "channel" of all of them, of a "network" what is more than its sizes say, or ""; blocks: there, of (how
    # many there are, how many stay) which of them do.
    "unit": {"free": True, "period": None, "along": "in", "format": "bitmask", "whole": False, "ends": (), "takes": "",
             "blocks": None},
    # of: what it is of: a "weight" [out, in], an "input" [in], or all of a "sublayer" [1].
    "score": {"of": "weight"},
    # mean: what the shares average over ("weight" or "block"); of: what the histogram is of (a function of the scores); chooses: how what a
    # grid costs is told, "gradients" or "trials", where it has no share to split but one of several grids to choose for every site;
    # spectra: whether it splits the ranks of factors, and so meets the target to within a rank; own: whether the scores say what stays, and
    # no share is asked for; learns: where it splits ranks by a ranking of singular values that a training finds, of (net, knobs but for
    # `source`) their scores by site.
    "budget": {"mean": "weight", "of": None, "chooses": "", "spectra": False, "own": False, "learns": None},
    # basis: whether it returns the Basis that sites are edited in and that stays with them, where others return a scale that what makes
    # the input takes the inverse of; outside: of (outputs, knobs, device) the Basis of the outputs, where they have one; shared: of (n,
    # knobs, device) a Basis that every site has which writes or reads the residual stream, or a head: packing leaves it out, in turn.
    # rounded: whether it is for inputs that are rounded; centre: of (a sample of an input, knobs) what is taken off it first, [in] or
    # None, where a norm's bias and those of all that read the input can take that.
    "rewrite": {"basis": False, "outside": None, "shared": None, "rounded": False, "centre": None},
    # of: what it has to see at once: "group" or "site", or a function of the knobs that says it; zero: whether a weight of zero stays zero,
    # as it has to behind a pass that drops; type: of its codes, a function of the knobs.
    "grid": {"of": "group", "zero": True, "type": None},
    # of: what it scores: "input", the site's own, "hidden", the gate of the MLP that the site ends, or "router", what is given to the
    # sublayer that the site ends; by: who decides, a "token" for itself, the sequences of a "step" together, or a "sentence" once; free:
    # whether what is computed is the asked share; roles: of the sites that it is made for, if not for all; check: of its knobs, BadInput
    # where they do not do.
    "gate": {"of": "input", "by": "token", "free": True, "roles": (), "check": None},
    # drops: whether it zeroes what the share says; codes: whether it leaves a grid, which no later pass could keep, or the type of codes
    # where the grid is its own; factors: whether
    # it leaves two of them, for a share of the parameters that is its own, or for its knobs `rank` and `energy`, or the format where it
    # leaves others, for the same;
    # books: whether it leaves indices into
    # codebooks, which no later pass could keep; spares: whether what the share says is
    # kept as it is, out of the hands of later passes, which have the rest; zero: whether a weight of zero stays zero, where it decides the
    # grid; either: whether its groups may lie along the outputs; based: whether what it leaves is in a basis of its own;
    # fuses: whether what it leaves of parts of the network is made of those that go, and it changes what makes the site's inputs;
    # gates: whether it leaves the weight and decides which inputs of a token meet it, for a share that is its own.
    # shares: what takes the weights of another, as the plan says, and is given them: a "layer" or a "head"; there the share is that of the
    # weights in scope that are left, what is shared counted once.
    "edit": {"drops": True, "codes": False, "factors": False, "books": False, "spares": False, "zero": True, "either": False,
             "based": False, "gates": False, "fuses": False, "shares": ""},
    # keeps: what of an edit, and of repairs before it, it leaves as it is: "mask", "codes", "factors", "books"; leaves: what it adds:
    # "factors", or a "bias", for sites that have one; level: what it sees at once, "site" or "net": there it is given the network behind
    # the sweep, trains, and returns what mends a site: f(name, change) -> change.
    "repair": {"keeps": ("mask",), "leaves": (), "level": "site"},
    "input": {},
    # holds: what it can store: "any", "mask", "nm", "block", "factors", "entrywise", "books"; codes: the types of codes it stores; bytes:
    # the size of every buffer as (shape, values, kept, knobs) -> {buffer: bytes}, where kept counts the entries its pattern keeps; stored:
    # that number, from the buffers of a packed weight, every index of which it checks; factors: the format of its factors, whose kernels
    # run it.
    "format": {"holds": "any", "codes": (), "bytes": None, "stored": None, "factors": ""},
}


def sections(fn: Callable[..., Any]) -> dict[str, str]:
    """First line as `what`, then the required sections; a section runs until the next one or a blank line."""
    doc = inspect.cleandoc(fn.__doc__ or "")
    out = {"what": doc.split("\n", 1)[0].strip()}
    for m in re.finditer(r"^(\w+): (.+(?:\n(?!\w+: |\n).+)*)", doc, re.M):
        out[m[1]] = re.sub(r"\s+", " ", m[2]).strip()
    return out


def method(axis: str, *, joint: tuple[str, ...] = (), inverse: Callable[..., Any] | None = None,
           xfail: dict[str, str] | None = None, **facts: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function on an axis. Anything malformed is an error at import."""

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        name = fn.__name__.rstrip("_")  # `global_` and the like are named for what a user types
        key = f"{axis}/{name}"
        if axis not in AXES:
            raise ValueError(f"{key}: no axis {axis!r}; axes are {', '.join(AXES)}")
        if key in _REG:
            raise ValueError(f"{key} registered twice: {inspect.getsourcefile(_REG[key].fn)}")
        params = inspect.signature(fn).parameters.values()
        if odd := [p.name for p in params if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]:
            raise ValueError(f"{key}: {odd} are neither data (positional) nor knobs (keyword-only)")
        data = tuple(p.name for p in params if p.kind is p.POSITIONAL_OR_KEYWORD)
        knobs = {p.name: p.default for p in params if p.kind is p.KEYWORD_ONLY}
        if bad := [k for k, v in knobs.items() if v is inspect.Parameter.empty or k not in KNOBS]:
            raise ValueError(f"{key}: knobs {bad} lack a default or are not in the vocabulary {sorted(KNOBS)}")
        if miss := [s for s in SECTIONS if not sections(fn).get(s)]:
            raise ValueError(f"{key}: docstring lacks {miss}")
        if (axis == "format") != (inverse is not None):
            raise ValueError(f"{key}: a format has an inverse, and only a format has")
        if unknown := set(facts) - set(FACTS[axis]):
            raise ValueError(f"{key}: {sorted(unknown)} cannot be declared on {axis}; {sorted(FACTS[axis])} can")
        needs = tuple(d for d in data if d not in DATA[axis])
        _REG[key] = Method(axis, name, fn, data, needs, knobs, joint, inverse, dict(xfail or {}),
                           {**FACTS[axis], **facts})
        return fn

    return wrap


@cache
def load_all() -> dict[str, Method]:
    """Import every method file; an import error is an error. Returns all methods in order of key."""
    for axis in AXES:
        pkg = importlib.import_module(f"trimtab.methods.{axis}")
        for name in sorted(i.name for i in pkgutil.iter_modules(pkg.__path__)):
            importlib.import_module(f"trimtab.methods.{axis}.{name}")
    for m in _REG.values():
        if bad := [n for n in m.needs if f"stat/{n}" not in _REG]:
            raise ValueError(f"{m.key} wants unknown statistics {bad}")
        if bad := [a for a in m.joint if a not in AXES]:
            raise ValueError(f"{m.key} decides unknown axes {bad}")
    return dict(sorted(_REG.items()))


def near(name: str, known: list[str]) -> str:
    """`; close: a, b` or the whole list when it is short or nothing is close."""
    hits = difflib.get_close_matches(name, known, 3, 0.5)
    return f"; close: {', '.join(hits)}" if hits else f"; known: {', '.join(sorted(known))}"


def get(key: str) -> Method:
    reg = load_all()
    if key not in reg:
        axis = key.split("/")[0]
        raise BadInput(f"no method {key!r}{near(key, [k for k in reg if k.startswith(axis)] or list(reg))}")
    return reg[key]
