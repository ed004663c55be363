"""The proof against direct computation: plain transformers loops, numpy on the files, hand-made timings."""
from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from trimtab.core import line, spec
from trimtab.core.types import Failed, Site
from trimtab.network.checkpoint import Checkpoint
from trimtab.network.stream import Network
from trimtab.prove.proof import _plain, far_off, faster_line, prove, run_fresh, skipped, smaller_line, verdict
from trimtab.prove.quality import compare
from trimtab.prove.size import sizes
from trimtab.prove.speed import _generate, _turn, measure


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny Llama and the same with three quarters of each MLP's `up` gone; token ids in two uneven batches."""
    torch.manual_seed(1)
    where = tmp_path_factory.mktemp("pair")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2))
    model.save_pretrained(where / "dense")
    for k, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.weight.data[: 48 if k else 64] = 0
    model.save_pretrained(where / "thin")
    gen = torch.Generator().manual_seed(2)
    batches = [{"input_ids": torch.randint(0, 97, (n, 20), generator=gen)} for n in (3, 2)]
    return where / "dense", where / "thin", batches


@torch.no_grad()
def plain(path, batches):
    """Logits [sequences, tokens, vocabulary] and hidden states behind each block, by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for k, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda m, i, out, k=k: seen[k].append(out[0] if isinstance(out, tuple) else out))
    logits = torch.cat([model(**b).logits for b in batches])
    return logits.double(), [torch.cat(s).double() for s in seen]


@pytest.mark.parametrize("max_memory", [None, 4096])
def test_quality_agrees_with_a_plain_loop(pair, tmp_path, max_memory, monkeypatch):
    monkeypatch.setattr("trimtab.prove.quality.LOGITS", 97 * 4 * 7)  # chunks of 7 positions, the last one shorter
    dense, thin, batches = pair
    told = []
    got = compare(Network.open(dense), Network.open(thin), batches, 500, tmp_path, max_memory,
                  lambda *a: told.append(a))
    (a, ha), (b, hb) = plain(dense, batches), plain(thin, batches)
    target = torch.cat([x["input_ids"] for x in batches])[:, 1:, None]
    p, q = a[:, :-1].log_softmax(-1), b[:, :-1].log_softmax(-1)
    for side, log in (("before", p), ("after", q)):
        nll = -log.gather(-1, target)
        assert got[side]["perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-4)
        assert got[side]["bits_per_byte"] == pytest.approx(float(nll.sum()) / math.log(2) / 500, rel=1e-4)
    assert got["score"] == got["after"]["perplexity"] and got["metric"] == "perplexity" and got["tokens"] == 5 * 19
    assert got["recovery"] == pytest.approx(got["before"]["perplexity"] / got["after"]["perplexity"])
    assert got["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert got["kl"] > 1e-3
    more = (p - q).gather(-1, target).double().mean((1, 2))  # of every sequence, all equally long
    assert got["recovery_error"] == pytest.approx(got["recovery"] * float(more.std() / len(more) ** 0.5), rel=1e-3)
    assert got["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-9)
    want = [float((y - x).norm() / x.norm()) for x, y in zip(ha, hb, strict=True)]
    assert got["block_error"] == pytest.approx(want, rel=1e-3) and want[0] > 0.01
    assert got["zeros"]["0.mlp.up"] == 1.0 and got["zeros"]["2.mlp.up"] == 0.75
    assert got["zeros"]["1.mlp.down"] == 0.0 and 0 < got["zero_share"] < 0.75
    assert told[-1] == ("quality", 5, 5)
    assert not any(f.is_file() for f in tmp_path.rglob("*"))


def test_masked_tokens_count_for_nothing(pair, tmp_path):
    dense, thin, batches = pair
    ids = batches[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    nets = Network.open(dense), Network.open(thin)
    padded = compare(*nets, [{"input_ids": ids, "attention_mask": mask}], None, tmp_path, None)
    short = compare(*nets, [{"input_ids": ids[:, :12]}], None, tmp_path, None)
    assert padded["tokens"] == short["tokens"] == 3 * 11
    for key in ("score", "kl", "top1_agreement", "recovery", "recovery_error"):
        assert padded[key] == pytest.approx(short[key], rel=1e-4)
    assert padded["after"]["bits_per_byte"] is None


def test_an_encoder_is_judged_by_the_cosine_of_its_pooled_output(tmp_path):
    torch.manual_seed(3)
    model = BertModel(BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                 num_attention_heads=4, max_position_embeddings=32, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path / "a")
    ids, mask = torch.randint(0, 50, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[1, 4:] = 0
    pooled = []
    for side in "ab":
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask).last_hidden_state.double()
            pooled.append(torch.stack([o[m.bool()].mean(0) for o, m in zip(out, mask, strict=True)]))
            for layer in model.encoder.layer:
                layer.intermediate.dense.weight[32:] = 0
        if side == "a":
            model.save_pretrained(tmp_path / "b")
    want = float(torch.nn.functional.cosine_similarity(*pooled).mean())
    result = prove(tmp_path / "a", tmp_path / "b", [{"input_ids": ids, "attention_mask": mask}], prompt=8, repeats=2)
    assert want < 0.999 and result["metric"] == "cosine"
    assert result["score"] == result["recovery"] == pytest.approx(want, abs=1e-5)
    assert result["after"]["perplexity"] is None and result["kl"] is None
    assert result["after"]["decode_tok_s"] is None and result["after"]["prefill_tok_s"] > 0
    assert "prefill with torch" in result["faster"]


def test_sizes_count_what_the_files_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.prove.size.CHUNK", 64)
    x = torch.randn(37, 5)
    x[x < 0] = 0
    x[0, 0] = -0.0
    save_file({"a": x, "b": x.to(torch.bfloat16), "ids": torch.arange(9)}, tmp_path / "one.safetensors")
    save_file({"c": x.half()}, tmp_path / "two.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    found = sizes(Checkpoint(tmp_path, {}, files))
    assert found == {"bytes": sum(len(f.read_bytes()) for f in files), "params": 3 * 185,
                     "nonzero": 3 * int((x != 0).sum())}


def test_speed_is_measured_or_else_estimated(pair):
    dense, thin, _ = pair
    for limit, how in ((None, "measured"), (1, "estimated")):
        got = measure(dense, thin, prompt=8, new=6, repeats=3, max_memory=limit)
        assert got["speed"] == how and got["repeats"] == 3 and got["new"] == 6
        for key in ("decode_tok_s", "prefill_tok_s"):
            low, high = got["after"]["spread"][key]
            assert 0 < low <= got["after"][key] <= high and got[key] == got["after"][key]
            r = got["ratio"][key]
            assert 0 < r["min"] <= r["median"] <= r["max"]
        assert got["before"]["first_token_s"] == pytest.approx(8 / got["before"]["prefill_tok_s"])
    assert measure(dense, None, prompt=200, new=200, repeats=1)["new"] == 32  # the model has 64 positions


def test_neither_side_always_goes_first():
    assert [_turn(r, 2) for r in range(3)] == [[0, 1], [1, 0], [0, 1]] and _turn(1, 1) == [0]


def test_generation_is_greedy_with_a_cache(pair):
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()
    fed = []
    forward = model.forward

    def spy(input_ids, **rest):
        fed.append(input_ids)
        return forward(input_ids, **rest)

    model.forward = spy
    ids = pair[2][0]["input_ids"][:1, :6]
    with torch.no_grad():
        _generate(model, {"input_ids": ids}, 5)
        model.forward = forward
        want = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.cat(fed, 1), want) and [f.shape[1] for f in fed] == [6, 1, 1, 1, 1, 1]


def test_words_say_no_when_the_numbers_do():
    a, packed = {"bytes": 11_500_000}, {"format": "bitmask", "bytes": 6_800_000}
    assert smaller_line(a, a, packed) == "no: 11.5 MB before, 11.5 MB after; as bitmask it would be 6.8 MB (0.59x)"
    assert smaller_line(a, a, {"format": "nm", "bytes": 12_000_000}).endswith("nm would not make it smaller")
    assert smaller_line(a, {"bytes": 5_750_000}, None) == "yes: 11.5 MB before, 5.8 MB after (0.50x)"

    def said(low, median, high, masked=True, pairs=5):
        r = {"min": low, "median": median, "max": high}
        return faster_line({"speed": "measured", "runner": "torch", "repeats": pairs,
                            "ratio": {"decode_tok_s": r}}, masked)

    assert said(0.96, 0.99, 1.03) == ("no: 0.99x decode with torch (0.96x to 1.03x over 5 pairs); "
                                      "a mask saves bytes, not time")
    assert said(0.99, 1.2, 1.4).startswith("no")       # one pair was slower
    assert said(1.001, 1.01, 1.4).startswith("no")     # less than 2 %
    assert said(1.3, 1.4, 1.5).startswith("yes: 1.40x decode") and "mask" not in said(1.3, 1.4, 1.5)
    assert said(1.3, 1.4, 1.5, pairs=4).startswith("no")
    assert "mask" not in said(0.9, 0.9, 0.9, masked=False)
    assert faster_line(None, True) == "not measured"


def test_what_gates_skip_is_weighted_by_weights():
    """Two gated sites of 100 and 300 weights, and one without a gate, which counts for nothing."""
    sites = [Site(n, 0, "mlp", r, r, shape, "mlp.in") for n, r, shape in (
        ("0.mlp.up", "up", (10, 10)), ("0.mlp.down", "down", (10, 30)), ("0.mlp.gate", "gate", (50, 50)))]
    found = skipped(sites, {"0.mlp.up": 0.5, "0.mlp.down": 0.75}, {"0.mlp.up": 0.5, "0.mlp.down": 0.7, "0.mlp.gate": 0.1})
    assert (found["target"], found["reached"]) == pytest.approx((0.35, 0.3125))
    assert found["sites"]["0.mlp.down"] == pytest.approx({"target": 0.3, "reached": 0.25})
    assert set(found["sites"]) == {"0.mlp.up", "0.mlp.down"}
    assert skipped(sites, {}, {"0.mlp.up": 0.5}) is None
    unknown = skipped(sites, {"0.mlp.up": 0.5}, {})
    assert unknown["target"] is None and unknown["reached"] == 0.5 and far_off(unknown) == []

    def said(up, down):
        return far_off(skipped(sites, {"0.mlp.up": 1 - up, "0.mlp.down": 1 - down}, {"0.mlp.up": 0.5, "0.mlp.down": 0.5}))

    assert said(0.5, 0.5) == [] and said(0.529, 0.471) == []
    where = "1 of 2 layers are more than 3 points off, most 0.mlp.up: 40.0% instead of 50.0%"
    assert said(0.4, 0.5) == [f"gates skip other shares on held-out text than asked: {where}"]
    assert said(0.4, 0.48) == [f"gates skip 46.0% of the weights on held-out text, 50.0% were asked; {where}"]


@pytest.mark.parametrize("after", [True, False])
def test_what_gates_skip_is_counted_on_held_out_text(tiny_lm, tmp_path, calib, after):
    """The proof and `eval` of the model alone: against thresholds held to the inputs that transformers says the first layer has."""
    other = tmp_path / "other.txt"
    other.write_text("Zebra! " * 400)
    opts = line.Options(keep=0.4, samples=4, seq_len=32, calib=(calib,), text=(str(other),), proof_tokens=96, speed=False, fresh=False)
    got = line.trim(tiny_lm, spec.load("*.q,*.down: gate_magnitude ; *.o: wina").limited(None, 0.4), tmp_path / "o", opts, lambda *_: None)
    samples = line.proof_samples(Network.open(tiny_lm), opts)
    if not after:
        got = prove(tmp_path / "o", None, samples, speed=False)
    sparsity = got["sparsity"]
    model, seen = AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].abs()))
    with torch.no_grad():
        for b in samples:
            model(**b)
    threshold = load_file(tmp_path / "o" / "trimtab.safetensors")["0.attn.q:gate_threshold"]
    assert sparsity["sites"]["0.attn.q"] == pytest.approx({"target": 0.6, "reached": float((torch.cat(seen) <= threshold).float().mean())})
    assert set(sparsity["sites"]) == {f"{i}.{r}" for i in range(3) for r in ("attn.q", "attn.o", "mlp.down")}
    assert sparsity["sites"]["1.attn.o"]["reached"] == pytest.approx(1 - 13 / 32)  # of every token the same number
    assert sparsity["target"] == pytest.approx(0.6)
    weights = {"attn.q": 32 * 32, "attn.o": 32 * 32, "mlp.down": 32 * 64}
    mean = sum(weights[n[2:]] * its["reached"] for n, its in sparsity["sites"].items()) / (3 * sum(weights.values()))
    assert sparsity["reached"] == pytest.approx(mean)
    off = any(abs(its["reached"] - 0.6) > 0.03 for its in sparsity["sites"].values())
    assert off and off == any("gates skip" in w for w in got["warnings"])
    if after:
        assert any("plain transformers runs the files without gates" in w for w in got["warnings"])
        assert json.loads((tmp_path / "o" / "trimtab.json").read_text())["sparsity"] == sparsity
        assert "- sparsity: gates skip" in (tmp_path / "o" / "README.md").read_text()


def test_verdict():
    def of(recovery, ppl=5.0):
        return {"metric": "perplexity", "score": ppl, "recovery": recovery, "after": {"perplexity": ppl}}

    assert verdict(of(0.96), None) == (True, []) and verdict(of(0.96), 0.96) == (True, [])
    ok, words = verdict(of(0.80), None)
    assert ok and "0.8" in words[0]
    ok, words = verdict(of(0.959), 0.96)
    assert not ok and "0.959" in words[0] and "0.96" in words[0]
    assert verdict(of(0.80), 0.5) == (True, [])
    for broken in (of(math.nan, math.nan), of(None, None), of(0.0, math.inf)):
        assert not verdict(broken, None)[0]


def test_a_fresh_process_proves_and_reports(pair, tmp_path):
    dense, thin, batches = pair
    save_file({"input_ids": torch.cat([b["input_ids"] for b in batches])}, tmp_path / "ids.safetensors")
    request = {"before": str(dense), "after": str(thin), "batches": str(tmp_path / "ids.safetensors"), "threads": 1,
               "bytes_of_text": 500, "packed_bytes": 50_000, "packed_format": "bitmask", "min_recovery": 5.0,
               "prompt": 8, "new": 4, "repeats": 2}
    stages = []
    got = run_fresh(request, lambda *a: stages.append(a))
    direct = compare(Network.open(dense), Network.open(thin), batches, 500, tmp_path, None)
    assert got["after"]["perplexity"] == pytest.approx(direct["after"]["perplexity"], rel=1e-4)
    weights = load_file(thin / "model.safetensors")
    assert got["after"]["nonzero"] == sum(int((w != 0).sum()) for w in weights.values()) < got["after"]["params"]
    assert got["after"]["bytes"] == (thin / "model.safetensors").stat().st_size
    assert got["after"]["decode_tok_s"] > 0 and got["peak_rss_bytes"] > 50e6 and got["seconds"] > 0
    assert got["proof"] == "failed" and "5" in got["warnings"][0] and "bitmask" in got["smaller"]
    assert {s for s, _, _ in stages} == {"quality", "speed"}

    broken = tmp_path / "broken"
    model = LlamaForCausalLM.from_pretrained(thin)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(broken)
    with pytest.raises(Failed, match=r"cannot be used.*down_proj"):
        run_fresh(request | {"after": str(broken)})
    assert json.loads(json.dumps(_plain({"x": [math.nan, math.inf, 1.5]}))) == {"x": [None, None, 1.5]}


def test_a_failing_child_says_why(tmp_path):
    with pytest.raises(Failed, match=r"nowhere\.safetensors"):
        run_fresh({"before": "x", "after": "y", "batches": str(tmp_path / "nowhere.safetensors")})


def test_the_child_dies_with_its_parent(tmp_path):
    pipe = tmp_path / "never"
    os.mkfifo(pipe)  # the child waits for inputs that never come
    code = f"from trimtab.prove.proof import run_fresh; run_fresh({{'before': 'x', 'batches': {str(pipe)!r}}})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    child = 0
    try:
        listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        assert soon(lambda: listed.read_text().split())
        child = int(listed.read_text().split()[0])
        parent.kill()
        parent.wait()
        assert soon(lambda: not alive(child))
    finally:
        parent.kill()
        parent.wait()
        if child and alive(child):
            os.kill(child, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(true, seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.02)
    return False
