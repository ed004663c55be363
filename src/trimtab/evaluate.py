"""eval, bench and inspect: the same measures as the proof, asked for on their own."""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from trimtab.core import data, line, memory
from trimtab.core.calibrate import Collector
from trimtab.core.line import Options, Report
from trimtab.core.types import BadInput
from trimtab.network.stream import Network


def compare(model: Path, against: Path | None, text: tuple[str, ...], tokens: int, seq_len: int, *, speed: bool = True,
            dtype: str = "float32", max_memory: int | None = None, trust_remote_code: bool = False,
            tick: Report = lambda s, d, n: None) -> dict[str, Any]:
    """Quality (and speed) of `model`, beside `against` when given; in a fresh process."""
    from trimtab.prove.proof import run_fresh

    opts = Options(text=text, proof_tokens=tokens, seq_len=seq_len, dtype=dtype, max_memory=max_memory, speed=speed,
                   trust_remote_code=trust_remote_code)
    net = Network.open(model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    samples = line.proof_samples(net, opts)
    with tempfile.TemporaryDirectory() as tmp:
        request = line.proof_request(against or model, model if against else None, net, samples, opts, Path(tmp))
        del net
        memory.release()
        own = memory.rss()
        result = run_fresh(request, tick)
    notes = line.read_notes(model)
    result |= {"model": str(model), "against": str(against) if against else None, "recipe": notes.get("recipe"),
               "plan_hash": notes.get("plan_hash"), "peak_rss_bytes": own + result["peak_rss_bytes"]}
    if notes.get("proof") in ("failed", "pending"):
        result.setdefault("warnings", []).append(f"{model} carries \"proof\": \"{notes['proof']}\"")
    return result


def evaluate(model: Path, against: Path | None, a: Any, tick: Report) -> dict[str, Any]:
    return compare(model, against, tuple(a.text), a.proof_tokens, a.seq_len, dtype=a.dtype, max_memory=a.max_memory,
                   trust_remote_code=a.trust_remote_code, tick=tick)


def bench(model: Path, against: Path | None, a: Any) -> dict[str, Any]:
    """decode_tok_s, prefill_tok_s, first_token_s and rss_bytes; with `against`, both in one run, alternating."""
    from trimtab.prove.speed import measure

    nets = [Network.open(x, dtype=getattr(torch, a.dtype), trust_remote_code=a.trust_remote_code) for x in (against, model) if x]
    prompt, new = a.prompt or 64, a.new or 64
    for net in nets:
        places = getattr(net.config.get_text_config(), "max_position_embeddings", None)
        asked = prompt + (new if net.kind == "lm" else 0)
        if (a.prompt or a.new) and places and asked > places:
            raise BadInput(f"--prompt {prompt} and --new {new} take {asked} positions, {net.checkpoint.path} has {places}; give fewer")
    return measure(nets[0], nets[1] if against else None, prompt=prompt, new=new, batch=a.batch, threads=torch.get_num_threads(),
                   dtype=getattr(torch, a.dtype), trust_remote_code=a.trust_remote_code)


def inspect(model: Path, a: Any, tick: Report) -> dict[str, Any]:
    """Sites by role with weight statistics, and how much each sublayer changes the residual stream."""
    net = Network.open(model, dtype=getattr(torch, a.dtype), trust_remote_code=a.trust_remote_code)
    roles: dict[str, dict[str, Any]] = {}
    cosines: dict[str, list[float]] = {}
    can_run = bool(a.calib) or (net.kind != "vision" and net.tokenizer() is not None)

    def look(i: int, module: Any, stats: Collector | None) -> None:
        for s in net.sites_of(i):
            w = net.weight(module, s).float()
            r = roles.setdefault(f"{s.group}.{s.role}", {"sites": 0, "shape": list(s.shape), "params": 0, "_small": 0.0, "_outlier": 0.0})
            r["sites"] += 1
            r["params"] += s.size
            r["_small"] += float((w.abs() < 0.1 * w.square().mean().sqrt()).float().mean())
            r["_outlier"] += float((w.abs() > 5 * w.abs().mean()).float().mean())
            if stats and len(cosines.setdefault(s.group, [])) <= i:  # once a sublayer: its sites share the figure
                cosines[s.group].append(round(float(stats.of(s)["cosine"]), 4))

    with tempfile.TemporaryDirectory() as scratch:
        samples = data.prepare(net, tuple(a.calib), "calibration", a.samples, a.seq_len, 0) if can_run else []
        walk = line.walker(net, samples, Path(scratch), None, None)
        needs = {s.name: {"cosine"} for s in net.sites} if can_run else {}
        walk(needs, look, "dense", lambda d, n: tick("inspect", d, n), 0)
    for r in roles.values():
        r["near_zero"] = round(r.pop("_small") / r["sites"], 4)
        r["outliers"] = round(r.pop("_outlier") / r["sites"], 5)
    in_sites = sum(s.size for s in net.sites)
    trimmable = sorted(((c, f"block {i} {g}") for g, cs in cosines.items() for i, c in enumerate(cs)), reverse=True)[:3]
    return {"model": str(model), "family": net.family.name, "blocks": net.n_blocks, "params": net.n_params,
            "params_in_sites": in_sites, "bytes": net.checkpoint.weight_bytes, "roles": roles, "sublayer_cosine": cosines,
            "most_redundant": [f"{name} (cosine {c:.3f})" for c, name in trimmable], "recipe": line.read_notes(model).get("recipe")}
