"""What a run would need, said before it starts and checked on one block end to end."""
from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.core import data, line, memory, pack, resize
from trimtab.core.calibrate import Collector, Walk
from trimtab.core.edits import edit_block
from trimtab.core.line import Options, Report
from trimtab.core.measured import Tried
from trimtab.core.registry import get
from trimtab.core.spec import Pass, Recipe
from trimtab.core.train import ROOM, held_bytes
from trimtab.core.types import Failed, Site
from trimtab.network.checkpoint import SafeFile
from trimtab.network.stream import Network

Sweeps = list[list[tuple[Pass, list[Site]]]]
WIDTH = 8           # sequences a calibration batch holds
COPY = 1e9          # bytes a second of reading a file that is cached, checking and converting it
PROOF_BASE = 0.75e9  # what a fresh process holds with torch and transformers imported, and two heads' logits


def flops() -> float:
    """Float32 operations a second of a layer of middle size, on this machine as busy as it is now."""
    x, w = torch.ones(1024, 1024), torch.ones(1024, 1024)
    best = float("inf")
    for _ in range(4):  # the first one wakes the threads
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - began)
    return 2 * 1024**3 / best


def walks(sweep: list[tuple[Pass, list[Site]]]) -> float:
    """How often a sweep runs all calibration tokens through every block."""
    passes = [p for p, _ in sweep]
    # Forward and backward, forward again where blocks are not kept, and now and then the samples held out.
    if (trainer := passes[0].trainer) is not None:
        return 1.0 + 4.0 * trainer.bound["epochs"]
    planned = [p for p in passes if p.chooses or (p.free and p.budget.key != "budget/uniform")]
    plan = any(line.plan_needs(p) for p in planned)
    if any(line.differentiates(p) for p in passes):
        return 5.0 * (1 + plan)  # forward, then forward again and backward
    here = 2.0 if passes[0].order == "sequential" else 1.0
    return plan + (here if any(p.needs - p.planned for p in passes) else 0.0)


def trying(p: Pass, sites: list[Site], keep: float, tokens: int) -> float:
    """How often a pass that tries shares runs all calibration tokens through every block: two sites a step, and both ways at the end."""
    if not p.tries:
        return 0.0
    several = len({s.role for s in sites}) > 1
    steps = (1 - (p.keep or keep)) / p.budget.bound["step"] * several
    return (1 + 2 * steps + several) * min(1.0, line.TRIED / tokens)


def editing(p: Pass, site: Site, speed: float) -> float:
    """Seconds for one site, roughly: sorting and copying it, solving with its Gram matrix where one is asked for, and decomposing it
    where that is the edit."""
    out, inside = site.shape
    decomposing = 30 * min(out, inside) ** 2 * max(out, inside) / speed * bool(p.steps["edit"].method.facts["factors"])
    return site.size * 2e-7 + (4 * inside**3 + 20 * out * inside**2) / speed * ("gram" in p.needs) + decomposing


def proving(net: Network, opts: Options, speed: float, edit: float) -> float:
    """Seconds of reloading both models, comparing them and timing them."""
    tokens = opts.proof_tokens or line.proof_tokens(net)
    timing = opts.speed_seconds or max(10.0, edit) if opts.speed and not opts.max_memory else 5.0 * opts.speed
    return 15 + 2 * (2 * net.n_params * tokens / speed + 2 * net.checkpoint.weight_bytes / COPY) + timing


def peak(net: Network, plan: Sweeps, samples: list[data.Batch], opts: Options) -> float:
    """Resident bytes at the worst moment: at a block's edit, at the embeddings, or in the proof's own process."""
    needs = {n for sweep in plan for p, _ in sweep for n in p.needs}
    sites = [s for sweep in plan for _, ss in sweep for s in ss]
    block = 4.0 * max((sum(s.size for s in net.sites_of(i)) for i in range(net.n_blocks)), default=0)
    largest = 4.0 * max((s.size for s in sites), default=0)
    inputs = {(s.block, s.input): s.shape[1] for s in sites}
    grams = 4.0 * max((sum(w * w for (b, _), w in inputs.items() if b == i) for i in range(net.n_blocks)), default=0)
    widest = max((s.shape[1] for s in sites), default=0)
    hidden = 4.0 * sum(line.tokens_of(net, b) for b in samples) * getattr(net.config.get_text_config(), "hidden_size", 0)
    if opts.max_memory and hidden > opts.max_memory // 16:
        hidden = 0.0
    batch = 4.0 * max((line.tokens_of(net, b) for b in samples), default=0) * WIDTH * 3 * widest
    work = 4 * largest
    if "gram" in needs:
        work += 2 * 8.0 * widest**2  # its inverse, in double
    if any(p.steps["edit"].method.facts["factors"] for sweep in plan for p, _ in sweep):
        work += 4 * largest  # singular vectors on both sides, and room to find them
    if needs & {"grads", "grad", "grad_sq"}:
        hidden *= net.n_blocks + 2
        work += block * (len(samples) if "grads" in needs else 2)
    if any(p.trainer or p.trains for sweep in plan for p, _ in sweep):
        hidden *= 3
        kept = held_bytes(net, max(line.tokens_of(net, b) for b in samples))
        work += kept if kept <= (opts.max_memory / 4 if opts.max_memory else ROOM) else 2 * block
    table = 4.0 * getattr(net.config.get_text_config(), "vocab_size", 0) * getattr(net.config.get_text_config(), "hidden_size", 0)
    edit = hidden + max(table, block + grams * ("gram" in needs) + max(batch, work))
    if not opts.speed or opts.max_memory:
        proof = PROOF_BASE + max(2 * table, 2 * block)
    else:
        proof = PROOF_BASE + 2 * 4.0 * net.n_params + net.checkpoint.weight_bytes
    return memory.rss() + max(edit, proof)


def first_guess(net: Network, recipe: Recipe, plan: Sweeps, samples: list[data.Batch], opts: Options) -> dict[str, float]:
    """Memory in bytes, disk in bytes, minutes; from shapes and the speed of one product."""
    speed = flops()
    tokens = sum(line.tokens_of(net, b) for b in samples)
    forward = sum(2.0 * s.size * tokens / speed for s in net.sites)
    seconds = 0.0
    for sweep in plan:
        edits = [(p, sites) for p, sites in sweep if not p.trainer]
        grams = {(s.block, s.input): s.shape[1] for p, sites in edits if "gram" in p.needs for s in sites}
        runs = walks(sweep) + sum(trying(p, sites, opts.keep, tokens) for p, sites in edits)
        runs += sum(4.0 * p.budget.bound["epochs"] for p, _ in edits if p.trains)
        seconds += runs * forward + sum(2.0 * w * w * tokens / speed for w in grams.values())
        seconds += sum(editing(p, s, speed) for p, sites in edits for s in sites)
    seconds += sum(bool(p.needs) + 2.0 * p.looks for p in recipe.structure if p.wiring) * forward
    seconds += 3 * net.checkpoint.weight_bytes / COPY
    disk = line.disk_estimate(net, recipe, samples if opts.max_memory else [], bool(opts.pack))
    return {"memory": peak(net, plan, samples, opts), "disk": disk,
            "minutes": (seconds + proving(net, opts, speed, seconds)) / 60}


def dry_run(model: Path, recipe: Recipe, out: Path, opts: Options, tick: Report) -> dict[str, Any]:
    """Estimate; then block 0 for real, saved and reloaded in a temporary folder that is removed; then estimate again."""
    line.set_up(opts)
    line.check_out(model, out, replace(opts, force=True))
    net = Network.open(model, dtype=getattr(torch, opts.dtype), trust_remote_code=opts.trust_remote_code)
    recipe = resize.sized(net, recipe)
    plan = [sweep for part in line.check_parts(net, recipe, opts) for sweep in line.sweeps(part, net.sites)]
    samples = data.prepare(net, opts.calib, "calibration", opts.samples, opts.seq_len, opts.seed) if recipe.calibrated else []
    guess = first_guess(net, recipe, plan, samples, opts)
    tick(f"estimate: {guess['memory'] / 1e9:.2f} GB memory, {guess['disk'] / 1e9:.2f} GB disk, {guess['minutes']:.1f} minutes", 0, 0)
    line.check_room(out, guess["disk"])
    if not plan:
        return {"estimate": guess, "measured": None, "recipe": recipe.text}
    owner = {s.name: p.options[0] for p, sites in plan[0] for s in sites}
    gradients = any(line.differentiates(p) for p, _ in plan[0])
    spill = None if opts.max_memory is None else opts.max_memory // 16
    clock = time.perf_counter
    with tempfile.TemporaryDirectory(prefix="trimtab-dry-") as scratch:
        began = clock()
        collect, embedding, forward = None, 0.0, 0.0
        if samples:
            walk = Walk(net, samples, Path(scratch), spill)
            walk.embed()
            embedding = clock() - began
        began = clock()
        module = net.block(0)
        reading = clock() - began
        if samples:
            began = clock()
            wanted = {s.name: {n for n in owner[s.name].needs if get(f"stat/{n}").facts["of"] != "grad"}
                      for s in net.sites_of(0) if s.name in owner}
            collect = Collector({n: w for n, w in wanted.items() if w}, {s.name: s for s in net.sites})
            walk.forward(module, 0, collect, False, lambda: None)
            walk.close()
            forward = clock() - began
        shares = {name: p.keep or opts.keep for name, p in owner.items()}
        began, tried = clock(), dict[str, float]()
        if asking := [(p, sites, p.keep or opts.keep) for p, sites in plan[0] if p.tries]:
            through = Tried(net, line.to_try(net, samples), Path(scratch))
            tried = line.tried_in(net, module, 0, asking, collect, through)
            shares |= tried
            through.close()
        trying_one = clock() - began
        began, ranks = clock(), {}
        if not gradients:  # gradient statistics need the whole forward walk: only their storage is tried here
            for s, change in edit_block(net, module, 0, owner, shares, collect, {})[0]:
                if (rank := pack.rank_left(owner[s.name], s, change)) is not None:
                    ranks[s.name] = rank
        from safetensors.torch import save_file

        stored, path = net.stored(module, 0), Path(scratch) / "block.safetensors"
        save_file(stored, path)
        back = SafeFile(path)
        if any(not torch.equal(back.read(n), t) for n, t in stored.items()):
            raise Failed("a saved block did not read back equal; the disk or the memory of this machine is not to be trusted")
        editing_one = clock() - began
    tokens = sum(line.tokens_of(net, b) for b in samples)
    trying_one += sum(trying(p, sites, opts.keep, tokens) for later in plan[1:] for p, sites in later) * forward
    per_block = len(plan) * (reading + editing_one) + sum(max(1.0, walks(s)) for s in plan) * forward + trying_one
    seconds = embedding * len(plan) + net.n_blocks * per_block + 3 * net.checkpoint.weight_bytes / COPY
    seconds += proving(net, opts, flops(), seconds)
    projected = {"memory": float(max(memory.peak_rss(), guess["memory"] if gradients else 0)), "minutes": seconds / 60}
    off = {k: round(guess[k] / projected[k] - 1, 3) for k in projected}
    tick(f"one block, saved and reloaded equal: {reading + forward + editing_one:.1f} s, {projected['memory'] / 1e9:.2f} GB peak; "
         f"projected {projected['minutes']:.1f} minutes; the estimate was off by {off['memory']:+.0%} in memory, "
         f"{off['minutes']:+.0%} in time", 0, 0)
    if tried:
        tick(f"shares of block 0: {', '.join(f'{name} {100 * share:.1f}%' for name, share in tried.items())}", 0, 0)
    if ranks:
        tick(f"ranks of block 0: {', '.join(f'{name} {rank}' for name, rank in ranks.items())}", 0, 0)
    return {"estimate": guess, "measured": {**projected, "block_seconds": round(reading + forward + editing_one, 3)}, "off_by": off,
            "recipe": recipe.text, "written": False, **({"shares": tried} if tried else {}), **pack.ranked(ranks, net.sites)}
