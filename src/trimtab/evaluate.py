"""eval, bench and inspect: the same measures as the proof, asked for on their own."""
from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.core import data, line, memory
from trimtab.core.calibrate import Collector
from trimtab.core.line import Options, Report
from trimtab.core.types import BadInput
from trimtab.methods.factors import shares_of, utilised_rank, whitened
from trimtab.network.stream import Network
from trimtab.runtime import native, packed

READ = 400 << 20  # bytes, many times a cache


def compare(model: Path, against: Path | None, text: tuple[str, ...], tokens: int, seq_len: int, *, speed: bool = True,
            dtype: str = "float32", max_memory: int | None = None, trust_remote_code: bool = False,
            tick: Report = lambda s, d, n: None) -> dict[str, Any]:
    """Quality (and speed) of `model`, beside `against` when given; in a fresh process."""
    from trimtab.prove.proof import run_fresh

    notes = line.read_notes(model)
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
    result |= {"model": str(model), "against": str(against) if against else None, "recipe": notes.get("recipe"),
               "plan_hash": notes.get("plan_hash"), "peak_rss_bytes": own + result["peak_rss_bytes"]}
    if notes.get("proof") in ("failed", "pending"):
        result.setdefault("warnings", []).append(f"{model} carries \"proof\": \"{notes['proof']}\"")
    return result


def evaluate(model: Path, against: Path | None, a: Any, tick: Report) -> dict[str, Any]:
    return compare(model, against, tuple(a.text), a.proof_tokens, a.seq_len, dtype=a.dtype, max_memory=a.max_memory,
                   trust_remote_code=a.trust_remote_code, tick=tick)


def bench(model: Path, against: Path | None, a: Any) -> dict[str, Any]:
    """decode_tok_s, prefill_tok_s, first_token_s and rss_bytes; with `against`, both in one run, alternating.

    Beside what `prove.speed.measure` returns: the machine, what it reads (read_gb_s) and multiplies (peak_gflop_s by the type of x; a
    multiplication and its addition are two), None without kernels, and of each model its bytes and which share of the reading its
    decoding reaches. Rows are appended to `a.out`.
    """
    from trimtab.demo import machine
    from trimtab.prove.speed import measure

    if a.out and not a.out.absolute().parent.is_dir():
        raise BadInput(f"{a.out.parent} is no folder; give --out a .jsonl file in one that exists")
    nets = [Network.open(x, dtype=getattr(torch, a.dtype), trust_remote_code=a.trust_remote_code) for x in (against, model) if x]
    recipes = [line.read_notes(net.checkpoint.path).get("recipe") or "dense" for net in nets]
    prompt, new = a.prompt or 64, a.new or 64
    for net in nets:
        places = getattr(net.config.get_text_config(), "max_position_embeddings", None)
        asked = prompt + (new if net.kind == "lm" else 0)
        if (a.prompt or a.new) and places and asked > places:
            raise BadInput(f"--prompt {prompt} and --new {new} take {asked} positions, {net.checkpoint.path} has {places}; give fewer")
    core, threads = native.core(), torch.get_num_threads()
    read = core and core.read_bandwidth(READ, threads, 2)
    result = measure(nets[0], nets[1] if against else None, prompt=prompt, new=new, batch=a.batch, threads=threads,
                     dtype=getattr(torch, a.dtype), trust_remote_code=a.trust_remote_code, ours=True, cache=a.cache)
    read = core and max(read, core.read_bandwidth(READ, threads, 2))
    for side, net, name, recipe in zip(("before", "after"), nets, [x for x in (a.against, a.model) if x], recipes, strict=False):
        steps = (result[side]["decode_tok_s"] or 0) / a.batch
        share = steps * (result[side]["weight_bytes"] or 0) / read if read and steps else None
        result[side] |= {"model": name, "bytes": net.checkpoint.weight_bytes, "share_of_read_bandwidth": share,
                         "recipe": recipe}
    result |= {"machine": machine(), "isa": native.level(), "read_gb_s": read and round(read / 1e9, 2),
               "peak_gflop_s": core and {t: round(core.peak_flops(t, threads, 20) / 1e9, 1) for t in ("f32", "bf16", "i8")}}
    if a.out:
        with a.out.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows_of(result))
    return result


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What `bench` found, as rows of results/*.jsonl: one for each model and metric."""
    shared = {k: result[k] for k in ("threads", "repeats", "speed", "machine", "isa", "read_gb_s", "peak_gflop_s")}
    setting = f"prompt {result['prompt']}" + (f", {result['new']} new" if result["new"] else "")
    setting += f", batch {result['batch']}" if result["batch"] > 1 else ""
    setting += f", cache {result['cache']}" if result["cache"] else ""
    rows = []
    for side in (result["before"], result["after"]):
        for metric, quartiles in (side["quartiles"] if side else {}).items():
            if metric != "first_token_s":
                its = {k: side[k] for k in ("recipe", "runner", "dtype", "bytes", "weight_bytes", "resident_bytes")}
                its |= {"share_of_read_bandwidth": side["share_of_read_bandwidth"]} if metric == "decode_tok_s" else {}
                rows.append({**shared, **its, "model": Path(side["model"]).name, "setting": setting, "metric": metric,
                             "value": side[metric], "quartiles": quartiles, "seed": 0, "methods": {}, "date": time.strftime("%Y-%m-%d")})
    return rows


def inspect(model: Path, a: Any, tick: Report) -> dict[str, Any]:
    """Sites by role with weight statistics, how many directions each uses, and how much each sublayer changes the residual stream.

    `sites`: of each `utilised_rank`, the directions that a share `a.energy` of its inputs and outputs lies in (0: none is told), and
    `utilisation`, that number over the shorter side; `mean_utilisation` over all of them, in `roles` over those of a role.
    With `a.verify` a packed directory is compared with the hashes it was written with first: BadInput where one differs, and
    where there are none. `verified` counts the tensors. With `a.activations` the hidden values of MLPs are measured besides, see
    `prove.activations`; with `a.report` all of it is written as a page.
    """
    from trimtab.prove.activations import activations

    if a.ppl and not a.activations:
        raise BadInput("--ppl says how much worse gates on activations may make the model; give --activations with it")
    if a.report:
        check_page(a.report, a.force)
    notes, active = line.read_notes(model), None
    if a.verify:
        packed.open(model, verify=True)
    net = Network.open(model, dtype=getattr(torch, a.dtype), trust_remote_code=a.trust_remote_code)
    verified = len(net.checkpoint.stored) if a.verify else None
    roles: dict[str, dict[str, Any]] = {}
    sites: dict[str, dict[str, Any]] = {}
    cosines: dict[str, list[float]] = {}
    can_run = bool(a.calib) or (net.kind != "vision" and net.tokenizer() is not None)

    def look(i: int, module: Any, stats: Collector | None) -> None:
        inside: dict[str, torch.Tensor] = {}  # by what they read
        for s in net.sites_of(i):
            w = net.weight(module, s).float()
            if stats and a.energy:
                gram = stats.of(s)["gram"]
                if s.input not in inside:
                    inside[s.input] = shares_of(torch.linalg.eigvalsh(gram.double()).flip(0))
                rank = utilised_rank(inside[s.input], shares_of(torch.linalg.svdvals(whitened(w, gram)).square()), a.energy)
                sites[s.name] = {"utilised_rank": rank, "utilisation": round(rank / min(s.shape), 4)}
            r = roles.setdefault(f"{s.group}.{s.role}", {"sites": 0, "shape": list(s.shape), "params": 0, "_small": 0.0, "_outlier": 0.0})
            r["sites"] += 1
            r["params"] += s.size
            r["_small"] += float((w.abs() < 0.1 * w.square().mean().sqrt()).float().mean())
            r["_outlier"] += float((w.abs() > 5 * w.abs().mean()).float().mean())
            if stats and len(cosines.setdefault(s.group, [])) <= i:  # once a sublayer: its sites share the figure
                cosines[s.group].append(round(float(stats.of(s)["cosine"]), 4))

    with tempfile.TemporaryDirectory() as scratch:
        samples = data.prepare(net, tuple(a.calib), "calibration", a.samples, a.seq_len, 0) if can_run or a.activations else []
        walk = line.walker(net, samples, Path(scratch), None, None)
        needs = {s.name: {"cosine"} | ({"gram"} if a.energy else set()) for s in net.sites} if can_run else {}
        walk(needs, look, "dense", lambda d, n: tick("inspect", d, n), 0)
        if a.activations:
            active = activations(net, samples, a.ppl or [1.0], Path(scratch), tick)
    of_role: dict[str, list[float]] = {}
    for s in (s for s in net.sites if s.name in sites):
        of_role.setdefault(f"{s.group}.{s.role}", []).append(sites[s.name]["utilisation"])
    for role, r in roles.items():
        r["utilisation"] = round(sum(of_role[role]) / len(of_role[role]), 4) if role in of_role else None
        r["near_zero"] = round(r.pop("_small") / r["sites"], 4)
        r["outliers"] = round(r.pop("_outlier") / r["sites"], 5)
    in_sites = sum(s.size for s in net.sites)
    trimmable = sorted(((c, f"block {i} {g}") for g, cs in cosines.items() for i, c in enumerate(cs)), reverse=True)[:3]
    result = {"model": str(model), "family": net.family.name, "blocks": net.n_blocks, "params": net.n_params,
              "params_in_sites": in_sites, "bytes": net.checkpoint.weight_bytes, "roles": roles, "sublayer_cosine": cosines,
              "most_redundant": [f"{name} (cosine {c:.3f})" for c, name in trimmable], "verified": verified,
              "recipe": notes.get("recipe"), **({"activations": active} if active else {}),
              **({"energy": a.energy, "sites": sites} if sites else {})}
    if sites:
        result["mean_utilisation"] = round(sum(u["utilisation"] for u in sites.values()) / len(sites), 4)
    if a.report:
        write_page(a.report, result, a)
    return result


def check_page(path: Path, force: bool) -> None:
    """Whether a page can be written there."""
    if not path.absolute().parent.is_dir():
        raise BadInput(f"{path.parent} is no folder; give --report an .html file in one that exists")
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"{path} is no .html file; give --report one, such as report.html")
    if path.exists() and not force:
        raise BadInput(f"{path} exists; choose another --report, or replace it with --force")


def write_page(path: Path, result: dict[str, Any], a: Any) -> None:
    """What `inspect` found, as a page, whole or not at all."""
    from trimtab.demo import machine
    from trimtab.report.page import inspect_page

    text = ", ".join(a.calib) or "built-in calibration split"
    staging = path.with_name(path.name + ".partial")
    staging.write_text(inspect_page(Path(a.model).name, result, {**machine(), "text": text, "dtype": a.dtype}), encoding="utf-8")
    staging.replace(path)
