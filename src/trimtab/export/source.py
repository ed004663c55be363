"""What is exported: an ordinary checkpoint, and the codes and factors that a trim left beside it."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trimtab.core.line import file_digest, read_notes
from trimtab.core.types import BadInput
from trimtab.methods.codes import Codes
from trimtab.methods.factors import Factors
from trimtab.methods.gates import PREFIX
from trimtab.methods.terms import Terms
from trimtab.network import graph
from trimtab.network.checkpoint import PARTS, Checkpoint, SafeFile, finite, not_finite


def without_skips(config: dict[str, Any]) -> dict[str, Any]:
    """config.json for those who know no layer without a sublayer: the files hold zeros for it."""
    own = {str(i): said for i, it in graph.per_layer(config).items() if (said := {k: v for k, v in it.items() if k != "skip"})}
    return {k: v for k, v in config.items() if k != graph.PER_LAYER} | ({graph.PER_LAYER: own} if own else {})


class Source:
    """A directory of ordinary tensors. `checkpoint`, `family`, `config`, `notes` (of trimtab.json).

    BadInput for a packed or otherwise quantised directory, and for weights that are not those which its parts belong to.
    """

    def __init__(self, path: Path):
        self.checkpoint = Checkpoint.open(path)
        self.path, self.config = path, without_skips(self.checkpoint.config)
        if self.checkpoint.packed:
            raise BadInput(f"{path} is packed for trimtab's own runtime; trim the model again without --pack and export that")
        if about := self.config.get("quantization_config"):
            method = about.get("quant_method") if isinstance(about, Mapping) else about
            raise BadInput(f"{path} is quantised already ({method}); export the model it was made from")
        if odd := [f"{k} in layer {i}" for i, own in graph.per_layer(self.config).items() for k in graph.OWN if own.get(k)]:
            raise BadInput(f"{path} has {odd[0]}, which nobody else computes; export the model it was made from")
        self.family = graph.family_of(self.config, path / "config.json")
        self.notes = read_notes(path)
        self.parts = self._parts()

    def _parts(self) -> SafeFile | None:
        """What lies beside the weights, once they are known to be the ones it was written for."""
        if not (self.path / PARTS).exists():
            return None
        parts = SafeFile(self.path / PARTS)
        try:
            written = json.loads(parts.metadata["trimtab"])["weights"]
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{parts.path} does not say which weights it belongs to; trim the model again") from None
        found = {f.name: file_digest(f) for f in self.checkpoint.files}
        if changed := sorted(n for n in found.keys() | written.keys() if found.get(n) != written.get(n)):
            raise BadInput(f"{self.path / changed[0]} is not the file that {PARTS} was written for; "
                           f"trim the model again, or remove {PARTS} to export the weights as they are")
        return parts

    @property
    def gated(self) -> int:
        """How many sites have a gate of their inputs."""
        return sum(n.endswith(f":{PREFIX}of") for n in self.parts.names) if self.parts is not None else 0

    def _simple(self, site: str) -> Terms | None:
        """What the parts of a site, `<block>.<group>.<role>`, say; None where that is nothing, or more than codes or factors alone."""
        if self.parts is None:
            return None
        terms = Terms.among({n.rpartition(":")[2]: self.parts.read(n) for n in self.parts.names if n.rpartition(":")[0] == site})
        return terms if terms is not None and terms.simple else None

    def codes(self, site: str) -> Codes | None:
        """The codes that are all of a site; None where there are none."""
        terms = self._simple(site)
        return terms.codes if terms else None

    def factors(self, site: str) -> Factors | None:
        """The factors that are all of a site; None where there are none."""
        terms = self._simple(site)
        return terms.factors if terms else None

    def find(self, name: str) -> str | None:
        """The stored name of a tensor, with or without the base model's prefix."""
        return next((n for n in (name, name.removeprefix("model.")) if n in self.checkpoint.tensors), None)

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype. BadInput where it is missing or not finite."""
        stored = self.find(name)
        if stored is None:
            raise BadInput(f"tensor {name} is missing from {self.path}; its config.json asks for it")
        t = self.checkpoint.read(stored)
        if not finite(t):
            raise not_finite(stored, self.path)
        return t
