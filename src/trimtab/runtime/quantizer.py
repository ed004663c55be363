"""What transformers asks when it meets a packed directory: its packed layers become layers that run on our kernels."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimtab.core.types import BadInput
from trimtab.methods.format.panels import Packed
from trimtab.methods.gates import INPUT, ROUTER
from trimtab.network import graph
from trimtab.network.checkpoint import read_json
from trimtab.network.stream import as_own
from trimtab.runtime import packed
from trimtab.runtime.layouts import VERSION
from trimtab.runtime.modules import PackedLinear

METHOD = "trimtab"


def _tell(model: Any) -> None:
    """Where a map is gated by the gate of the MLP it ends, or by what its sublayer is given, these values reach it."""
    from transformers.activations import ACT2FN

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, PackedLinear) or layer.linear.gate is None or layer.linear.gate.of == INPUT:
            continue
        if layer.linear.gate.of == ROUTER:
            first = model.get_submodule(_beginning(model, name))
            first.register_forward_pre_hook(lambda m, args, layer=layer: layer.scoring(args[0]), prepend=True)
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        gate, act = getattr(owner, "gate_proj", None), getattr(model.config, "hidden_act", None)
        if gate is None or act is None:
            raise BadInput(f"{name}: its gate scores that of the MLP, which {type(owner).__name__} has not by the name gate_proj; run the "
                           "directory with trimtab")
        gate.register_forward_hook(lambda m, args, y, layer=layer, f=ACT2FN[act]: layer.scoring(f(y)))


def _beginning(model: Any, name: str) -> str:
    """The name of a map that is given what the sublayer is that this one ends."""
    family = graph.family_of(model.config.to_dict())
    for roles in (family.attn, *family.mlp.values()):
        for last, first in (("o", "q"), ("down", "gate"), ("down", "up")):
            if first in roles and name.endswith(f".{roles.get(last)}"):
                return name.removesuffix(roles[last]) + roles[first]
    raise BadInput(f"{name}: its gate looks at what a sublayer is given, and it ends none that {family.name} has; pack the model again")


@register_quantization_config(METHOD)
class TrimtabConfig(QuantizationConfigMixin):
    """`version` of the layout; `linears`: the description of every packed layer by the name of its module."""

    def __init__(self, version: int = VERSION, linears: dict[str, Any] | None = None, **_: Any):
        self.quant_method = METHOD
        self.version, self.linears = version, linears or {}


@register_quantizer(METHOD)
class TrimtabQuantizer(HfQuantizer):
    """Packed layers lie in mappings of the files: transformers loads everything else."""

    requires_calibration = True  # it reads what was packed, and packs nothing

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> None:
        if not checkpoint_files:
            raise BadInput("a packed model is loaded from its directory")
        with torch.device("cpu"):  # around it transformers builds without memory
            where = Path(checkpoint_files[0]).parent
            self._skip(model, read_json(where / "config.json"))
            self._replace(model, packed.open(where).linears)
        model._keys_to_ignore_on_load_unexpected.add(r"\.packed_\w+$")

    def _skip(self, model: Any, config: dict[str, Any]) -> None:
        """Let layers run as config.json says of them alone; the weights of sublayers that they lack are not in the files."""
        family = graph.family_of(config)
        blocks = model.base_model.get_submodule(family.blocks)
        for i, own in graph.per_layer(config).items():
            as_own(family, blocks[i], model.config, own, i)

    def _replace(self, model: Any, linears: dict[str, Packed]) -> None:
        base = f"{model.base_model_prefix}."
        modules = dict(model.named_modules())
        for name, linear in linears.items():
            # The same files serve the bare model and the one with a head; a head that is not there is not needed.
            at = next((n for n in (name, base + name, name.removeprefix(base)) if n in modules), None)
            if at is None:
                continue
            old = modules[at]
            if type(old) is not nn.Linear or tuple(old.weight.shape) != linear.shape:
                raise BadInput(f"{at} of {type(model).__name__} is no linear layer of {list(linear.shape)}, as which it was packed")
            owner, _, leaf = at.rpartition(".")
            setattr(model.get_submodule(owner), leaf, PackedLinear(linear, old.bias))
        _tell(model)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
