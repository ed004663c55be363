"""One rotation of the residual stream and of every head: with the sites in plain files, with their neighbours where it is packed."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab as tt
from tests import tiny
from trimtab.core.types import BadInput
from trimtab.methods.basis import Basis, by_head, mixed
from trimtab.methods.rewrite.kurtail import kurtail, kurtosis
from trimtab.runtime.decoder import open_decoder

RECIPE = "quarot | int(bits=4,group=0) | rtn"


@pytest.fixture(scope="module")
def ids(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file(tiny.inputs("llama", 2, 16), path)
    return str(path)


def trimmed(model, out, ids, recipe=RECIPE, **options):
    return tt.trim(model, recipe, out, calib=(ids,), text=(ids,), samples=2, speed=False, fresh=False, **options)


def based(out) -> set[str]:
    """Those layers of a packed directory that turn anything, by the last part of their names."""
    linears = json.loads((out / "config.json").read_text())["quantization_config"]["linears"]
    return {n.rpartition(".")[2] for n, about in linears.items() if about["format"] == "based"}


def agree(tmp_path, tol: float = 2e-3) -> None:
    """Plain files, and the packed ones in the decoder and in transformers."""
    x = torch.arange(5, 30)
    with torch.no_grad():
        want = tt.load(tmp_path / "plain").module(x[None]).logits[0]
        packed = tt.load(tmp_path / "packed").module(x[None]).logits[0]
    torch.testing.assert_close(open_decoder(tmp_path / "packed", "float32").logits(x), want, rtol=0, atol=tol * float(want.std()))
    assert float((packed - want).abs().max()) < 0.5 * float(want.std())  # x in eight bits


@pytest.mark.parametrize("family", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
def test_neighbours_take_the_turn(tmp_path, ids, family):
    """llama_tied has a bias everywhere, qwen2 one for v; what is left is the input of the MLP's last map, and the head's."""
    model = tiny.save(family, tmp_path / "m", tie_word_embeddings=False)
    trimmed(model, tmp_path / "plain", ids)
    found = trimmed(model, tmp_path / "packed", ids, pack="recipe", head="keep")
    assert based(tmp_path / "packed") == {"down_proj", "lm_head"} and not any("rotation" in w for w in found["warnings"])
    agree(tmp_path)
    before, after = (load_file(d / "model.safetensors")["model.embed_tokens.weight"] for d in (model, tmp_path / "packed"))
    torch.testing.assert_close(mixed(32, 0, before.device).of(before), after)


def test_a_head_that_is_the_table_is_stored_apart_or_nothing_is_fused(tmp_path, ids):
    model = tiny.save("llama_tied", tmp_path / "m")
    trimmed(model, tmp_path / "plain", ids)
    found = trimmed(model, tmp_path / "packed", ids, pack="recipe", head="keep")
    assert any("--head int8" in w for w in found["warnings"])
    assert based(tmp_path / "packed") == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    agree(tmp_path)
    found = trimmed(model, tmp_path / "packed", ids, pack="recipe", force=True)
    assert based(tmp_path / "packed") == {"down_proj", "lm_head"}
    agree(tmp_path, 0.05)  # the head in eight bits


def test_what_does_not_agree_keeps_its_own(tmp_path, ids):
    """Only some sites turned, or turned otherwise: the same outputs, and a line that says what it costs."""
    model = tiny.save("llama", tmp_path / "m")
    cases = {
        f"attn: {RECIPE}": ({"q_proj", "k_proj", "v_proj", "o_proj"}, "in another basis"),
        "attn: quarot | int(bits=8,group=0) | rtn ; mlp: quarot | int(bits=4,group=0) | rtn": ({"down_proj", "lm_head"}, None),
        "attn: quarot(seed=1) | int(bits=8,group=0) | rtn ; mlp: quarot(seed=2) | int(bits=4,group=0) | rtn":
            ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "in another basis"),
        # Those that read it alone, of equal matrices with other signs.
        "attn: quarot(seed=1) | int(bits=8,group=0) | rtn ; *.down: quarot(seed=1) | int(bits=8,group=0) | rtn ; "
        "*.gate,*.up: quarot(seed=2) | int(bits=4,group=0) | rtn":
            ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "in another basis"),
    }
    for recipe, (left, line) in cases.items():
        trimmed(model, tmp_path / "plain", ids, recipe, force=True)
        found = trimmed(model, tmp_path / "packed", ids, recipe, pack="recipe", head="keep", force=True)
        assert based(tmp_path / "packed") == left
        said = [w for w in found["warnings"] if "rotation" in w]
        assert len(said) == bool(line) and all(line in w for w in said)
        agree(tmp_path)


def test_a_norm_with_a_zero_keeps_its_weight(tmp_path, ids):
    model = tiny.save("llama", tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    trimmed(model, tmp_path / "plain", ids)
    found = trimmed(model, tmp_path / "packed", ids, pack="recipe", head="keep")
    assert any("nearly zero" in w for w in found["warnings"])
    agree(tmp_path)


@pytest.mark.parametrize(("family", "recipe", "message"), [
    ("gpt2", RECIPE, "and this is a GPT2LMHeadModel; use hadamard"),
    ("gemma2", RECIPE, "use hadamard"), ("mixtral", RECIPE, "use hadamard"), ("llama_classifier", RECIPE, "use hadamard"),
    ("llama", f"inputs | peak | spare(keep=0.2,bits=4) ; {RECIPE}", "of which edit/spare.* keeps a part as it is; use hadamard"),
    ("llama", "quarot | wanda", "as codes or factors alone"),
])
def test_what_cannot_be_turned_is_refused(tmp_path, ids, family, recipe, message):
    with pytest.raises(BadInput, match=message):
        trimmed(tiny.save(family, tmp_path / "m"), tmp_path / "o", ids, recipe)
    assert not (tmp_path / "o").exists()


def test_by_head_turns_every_head_alike():
    turn = mixed(8, 3, torch.device("cpu"))
    x = torch.randn(5, 24)
    torch.testing.assert_close(by_head(turn, 3).of(x), turn.of(x.unflatten(-1, (3, 8))).flatten(-2))
    torch.testing.assert_close(turn.scaled(torch.full((8,), 2.0)).of(x[:, :8]), turn.of(2 * x[:, :8]))
    assert isinstance(turn, Basis)


def test_kurtail_flattens_what_it_is_asked_to():
    """Of inputs some of which lie far out, and of weights likewise: the tails are shorter than in the Hadamard basis it begins with."""
    gen = torch.Generator().manual_seed(5)
    far = torch.randn(64, generator=gen).exp() * 3
    x, w = torch.randn(400, 64, generator=gen) * far, torch.randn(96, 64, generator=gen) * far.flip(0)

    def tails(t: torch.Tensor) -> float:
        return float((kurtosis(t) - 1.8).abs().mean())

    start = kurtail(w, x, iters=0)
    inputs, both = kurtail(w, x), kurtail(w, x, scale=1.0)
    assert tails(inputs.of(x)) < 0.9 * tails(start.of(x)) < tails(x)
    assert tails(both.of(w)) < 0.9 * tails(start.of(w))
    assert tails(both.of(w)) < tails(inputs.of(w))
    assert tails(inputs.of(x)) < tails(both.of(x))
