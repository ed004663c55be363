"""What a run would need, said before it starts and checked on one block end to end."""
from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.core import data, line, memory
from trimtab.core.calibrate import Collector, Walk
from trimtab.core.line import Options, Report
from trimtab.core.registry import get
from trimtab.core.spec import Recipe
from trimtab.core.types import Failed
from trimtab.network.checkpoint import SafeFile
from trimtab.network.stream import Network

FLOPS = 6e10  # a modest core pair; only the first estimate rests on it, the second is measured


def first_guess(net: Network, recipe: Recipe, samples: list[data.Batch]) -> dict[str, float]:
    """Memory in bytes, disk in bytes, minutes; from shapes alone."""
    per_block = max((sum(s.size for s in net.sites_of(i)) for i in range(net.n_blocks)), default=0)
    tokens = sum(line.tokens_of(net, b) for b in samples)
    widest = max((s.shape[1] for s in net.sites), default=0)
    gram = "gram" in recipe.needs
    grads = "grads" in recipe.needs
    hidden = tokens * int(getattr(net.config, "hidden_size", 0)) * 4
    vocab = int(getattr(net.config, "vocab_size", 0)) * int(getattr(net.config, "hidden_size", 0)) * 4
    work = per_block * 4 * 2.5 + widest**2 * 4 * (6 if gram else 0) + (per_block * 4 * len(samples) if grads else 0)
    flops = 2.0 * per_block * tokens * (2 if recipe.needs else 0) * net.n_blocks * (2 if grads else 1)
    flops += (2.0 * widest**2 * tokens + widest**3 * 4) * net.n_blocks * (1 if gram else 0)
    return {"memory": memory.rss() + max(work, vocab * 1.2) + hidden, "disk": line.disk_estimate(net, recipe, samples),
            "minutes": (flops / FLOPS + net.checkpoint.weight_bytes / 2e8 + 20) / 60}


def dry_run(model: Path, recipe: Recipe, out: Path, opts: Options, tick: Report) -> dict[str, Any]:
    """Estimate; then block 0 for real, saved and reloaded in a temporary folder that is removed; then estimate again."""
    line.set_up(opts)
    line.check_out(model, out, replace(opts, force=True))
    net = Network.open(model, dtype=getattr(torch, opts.dtype), trust_remote_code=opts.trust_remote_code)
    plan_sweeps = line.sweeps(recipe, net.sites)
    line.check_recipe(net, plan_sweeps, opts, opts.samples)
    samples = data.prepare(net, opts.calib, "calibration", opts.samples, opts.seq_len, opts.seed) if recipe.needs else []
    guess = first_guess(net, recipe, samples)
    tick(f"estimate: {guess['memory'] / 1e9:.2f} GB memory, {guess['disk'] / 1e9:.2f} GB disk, {guess['minutes']:.1f} minutes", 0, 0)
    line.check_room(out, guess["disk"])
    if not plan_sweeps:
        return {"estimate": guess, "measured": None, "recipe": recipe.text}
    began = time.time()
    owner = {s.name: p for p, sites in plan_sweeps[0] for s in sites}
    gradients = any(get(f"stat/{n}").facts["of"] == "grad" for n in recipe.needs)
    spill = None if opts.max_memory is None else opts.max_memory // 16
    with tempfile.TemporaryDirectory(prefix="trimtab-dry-") as scratch:
        collect = None
        module = net.block(0)
        wanted = {s.name: {n for n in owner[s.name].needs if get(f"stat/{n}").facts["of"] != "grad"}
                  for s in net.sites_of(0) if s.name in owner}
        if samples:
            walk = Walk(net, samples, Path(scratch), spill)
            walk.embed()
            collect = Collector({n: w for n, w in wanted.items() if w}, {s.name: s for s in net.sites})
            walk.forward(module, 0, collect, False, lambda: None)
            walk.close()
        if not gradients:  # gradient statistics need the whole forward walk: only their storage is tried here
            for s in net.sites_of(0):
                if s.name in owner:
                    p = owner[s.name]
                    change = line.edit_site(p, s, net.weight(module, s).float(), p.keep or opts.keep,
                                            collect.of(s) if collect else {}, None)
                    net.set_weight(module, s, change.w.to(net.stored_dtype(s)))
        from safetensors.torch import save_file

        stored, path = net.stored(module, 0), Path(scratch) / "block.safetensors"
        save_file(stored, path)
        back = SafeFile(path)
        if any(not torch.equal(back.read(n), t) for n, t in stored.items()):
            raise Failed("a saved block did not read back equal; the disk or the memory of this machine is not to be trusted")
    seconds = time.time() - began
    passes = 2 if recipe.needs else 1
    projected = {"memory": memory.peak_rss(), "minutes": (seconds * net.n_blocks * passes + 20) / 60 * len(plan_sweeps)}
    off = {k: round(guess[k] / projected[k] - 1, 3) for k in projected}
    tick(f"one block, saved and reloaded equal: {seconds:.1f} s, {projected['memory'] / 1e9:.2f} GB peak; "
         f"projected {projected['minutes']:.1f} minutes; the estimate was off by {off['memory']:+.0%} in memory, "
         f"{off['minutes']:+.0%} in time", 0, 0)
    return {"estimate": guess, "measured": {**projected, "block_seconds": round(seconds, 3)}, "off_by": off,
            "recipe": recipe.text, "written": False}
