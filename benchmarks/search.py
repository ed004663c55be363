"""What the search finds beside what one family of methods gives, at equal speed and at equal loss, with the same number of trials.

    python benchmarks/search.py builtin:lm builtin:lm results/search.jsonl [--trials 320] [--threads N] [--seed N] [--again]

Five ways look for recipes: the search; random choices from the same space; evolution inside every family alone; and one option everywhere.
Each takes as many trials (the last one has no more than there are options). Of each the best is finished: the least loss on the search
split at 1.25, 1.5, 2 and 3 times the dense model's speed, and the fastest that loses 1, 3 and 10 %. Then all finished models are timed in
turns, and run on all the text there is for proofs, which no search saw. A row a model, those that went against the search too. With --again
the models of the last run, finished in --work, are only timed once more.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import green

from trimtab.builtin import model_path
from trimtab.core import data, line
from trimtab.core.calibrate import StatCache
from trimtab.demo import machine
from trimtab.network.stream import Network
from trimtab.prove.quality import Stream
from trimtab.runtime.decoder import Decoder, open_decoder
from trimtab.search.edited import Edited, cache_home
from trimtab.search.front import Limits, first_front
from trimtab.search.options import DENSE, DROP, FAMILIES, HEAD, OPTIONS, opened_by
from trimtab.search.quality import Assembled, Judge, mean_of
from trimtab.search.search import Asked, Clock, Finisher, answer_of, baselines, known_rises, of_known, texts_of, whole_of
from trimtab.search.space import KEEP, Space, space_of
from trimtab.search.timing import Layouts, Runs, dense_decoders, fastest_dense, of_timed, prompts_of, race
from trimtab.search.trials import Search, Trial, open_study, trials_of
from trimtab.search.work import tables_by

SPEEDS, LOSSES = (1.25, 1.5, 2.0, 3.0), (0.01, 0.03, 0.1)
ROOM = 1.01  # what was told to be so fast should be, and a little more
PROOF = 400_000  # tokens at most: of 8,192 the perplexities of what loses little are not told apart
ROWS = 8  # sequences at once
PARTS, ROUNDS, PAUSE = 6, 12, 30  # of the race, with seconds between them: a machine may be another one for minutes


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("model")
    ask.add_argument("name")
    ask.add_argument("out", type=Path)
    ask.add_argument("--trials", type=int, default=320)
    ask.add_argument("--threads", type=int, default=0)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--work", type=Path, default=Path("build/search"), help="where models are finished; those that are there are used")
    ask.add_argument("--speeds", type=float, nargs="+", default=list(SPEEDS))
    ask.add_argument("--losses", type=float, nargs="*", default=list(LOSSES))
    ask.add_argument("--again", action="store_true", help="time the models of the last run once more")
    a = ask.parse_args()
    if not green("decoder"):
        raise SystemExit("the decoder's tests are red: nothing is timed")
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    model = model_path(a.model) if a.model.startswith("builtin:") else Path(a.model)
    asked = Asked(threads=a.threads, seed=a.seed)
    line.set_up(asked.options)
    net, clock = Network.open(model), Clock(time.monotonic(), math.inf)
    calibration, split, more = texts_of(net, asked)
    if a.again:
        once_more(a, model, prompts_of(calibration, 1, asked.context))
        return
    limits = [*(Limits(speed=s * ROOM) for s in a.speeds), *(Limits(loss=x) for x in a.losses)]
    with tempfile.TemporaryDirectory() as tmp:
        def told(stage: str, done: int, of: int) -> None:
            print(f"{time.strftime('%H:%M:%S')} {stage} {done} of {of}" if of else stage, flush=True) if done == of else None

        space = space_of(net, opened_by("ours"))
        costs = Layouts(model, net, space, calibration, cache_home(), Path(tmp), batch=1, context=asked.context,
                        machine=machine()).costs(told)
        space = of_timed(space, costs)
        edited = Edited(net, calibration, cache_home(), StatCache())
        assembled = Assembled(net, space, split, edited.read, Path(tmp), more)
        tables = tables_by(None, edited, assembled)
        whole, tried = whole_of(net, space, edited, assembled, tables, clock, told)
        print("of", tried, "chosen:", whole)
        space, costs = space.made(whole), costs.made(whole)
        rises = known_rises(net, space, costs, edited, assembled, tables, clock, told)
        space = of_known(space, rises)

        def looked(own: Space, how: str) -> list[Trial]:
            study = open_study(str(Path(tmp) / f"{how}.db"), seed=a.seed)
            work = Search(study, own, costs, rises, assembled.rises, a.seed, limits=limits)
            if how == "random":
                drawn = [work.random() for _ in range(a.trials)]
                return [Trial(c, r, costs.time(c), costs.size(c), how) for c, r in zip(drawn, assembled.rises(drawn), strict=True)]
            if how == "uniform":
                each = [space.uniform(o) | {HEAD: h} for o in sorted({o for p in space.places for o in p.options}) for h in space.heads]
                return [Trial(c, r, costs.time(c), costs.size(c), how) for c, r in zip(each, assembled.rises(each), strict=True)]
            rivals = [c for x in limits for _, c in baselines(own, costs, rises, x)] if how == "search" else []
            work.queue([own.dense, *first_front(own, costs, rises, *limits), *rivals], "program")
            some = {o for p in own.places for o in p.options} - {DENSE, DROP}
            work.queue([own.uniform(o) for o in sorted(some)], "uniform")
            work.run(math.inf, most=a.trials, guided=how == "search")
            return trials_of(study, own)

        ways = {"search": looked(space, "search"), "random": looked(space, "random"), "uniform": looked(space, "uniform")}
        for family in FAMILIES:
            own = space.only(o for o in OPTIONS if OPTIONS[o].family == family)
            if family != "mixed" and any(p.options != (DENSE,) for p in own.places):
                ways[family] = looked(own if family == "quantise" else replace(own, heads=(KEEP,)), family.replace(" ", "-"))
            print(time.strftime("%H:%M:%S"), "looked:", *ways, flush=True)
        a.work.mkdir(parents=True, exist_ok=True)
        finisher = Finisher(model, net, space, costs, a.work, asked, edited.stats, clock, told, calibration)
        chosen: list[tuple[str, str, Trial]] = []
        judge = Judge(assembled)
        for how, trials in ways.items():
            for s in a.speeds:
                if (t := answer_of(trials, Limits(speed=s * ROOM), costs, judge)) is not None:
                    chosen.append((how, f"{s:g}x", t))
            for x in a.losses:
                if (t := answer_of(trials, Limits(loss=x), costs, judge)) is not None:
                    chosen.append((how, f"{100 * x:g}% loss", t))
        for k, (how, setting, t) in enumerate(chosen):
            mark = hashlib.sha256(json.dumps(t.choices, sort_keys=True).encode()).hexdigest()[:8]
            finisher.finish(t.choices, f"{how} {setting} {mark}".replace(" ", "-").replace("%", "pc"))
            print(f"{k + 1} of {len(chosen)}", end=" ", flush=True)
        names = list(finisher.proofs)
        unique = {n: next(m for m in names if finisher.choices[m] == finisher.choices[n]) for n in names}
        decoders = {n: open_decoder(finisher.timed(n)) for n in sorted(set(unique.values()))}
        runs = in_parts({**dense_decoders(model), **decoders}, prompts_of(calibration, 1, asked.context))
        base = fastest_dense(runs)
        dense_loss, threads = assembled.dense, torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # nothing is timed any more
        text = line.proof_samples(net, replace(asked.options, proof_tokens=PROOF))
        plain = losses(net, text, Path(tmp))
        lost = {}
        for n in sorted(set(unique.values())):
            lost[n] = losses(Network.open(a.work / "models" / n), text, Path(tmp))
            print(f"\n{time.strftime('%H:%M:%S')} {len(text)} sequences: {n}", end="", flush=True)
        for name, (how, setting, t) in zip(names, chosen, strict=True):
            proof, run = finisher.proofs[name], runs[unique[name]]
            its = lost[unique[name]]
            rise, error = mean_of([x - y for x, y in zip(its, plain, strict=True)])
            found = next((n for n, (h, at, _) in zip(names, chosen, strict=True) if (h, at) == ("search", setting)), None)
            ahead = mean_of([x - y for x, y in zip(its, lost[unique[found]], strict=True)]) if found and how != "search" else None
            row: dict[str, Any] = {
                "recipe": how, "pipeline": proof["pipeline"], "plan_hash": proof["plan_hash"], "model": a.name, "setting": setting,
                "metric": "perplexity", "value": math.exp(statistics.fmean(its)), "dense": math.exp(statistics.fmean(plain)),
                "error": error * math.exp(-rise), "ahead": ahead, "tokens": len(text) * (asked.seq_len - 1), "kl": proof["kl"],
                "search_value": math.exp(dense_loss + t.rise), "search_dense": math.exp(dense_loss), "told": costs.dense / t.us,
                "bytes": proof["after"]["bytes"], "dense_bytes": proof["before"]["bytes"], "baseline": base, "by": t.by,
                "trials": len(ways[how]), "whole": str(whole), "began": began, "table": "search", "seed": a.seed, "methods": {},
                "threads": threads, "machine": machine(), "date": time.strftime("%Y-%m-%d")} | speeds(run, runs[base])
            keep(a.out, row)
            print(f"\n{setting:<9} {how:<9} perplexity {row['value']:8.4f} of {row['dense']:.4f}: {1e3 * rise:7.3f} ± {1e3 * error:.3f} "
                  "thousandths of a nat" + (f", the search {1e3 * ahead[0]:.3f} ± {1e3 * ahead[1]:.3f} less" if ahead else "")
                  + f"; {row['speed']:.3f} x (told {row['told']:.3f})  {row['bytes'] / 1e6:.2f} MB", end="", flush=True)
        print()


def in_parts(decoders: dict[str, Decoder], prompts: list[torch.Tensor]) -> dict[str, Runs]:
    """A race with pauses."""
    runs = {name: Runs(d.places) for name, d in decoders.items()}
    for k in range(PARTS):
        time.sleep(PAUSE if k else 0)
        for name, part in race(decoders, prompts, rounds=ROUNDS).items():
            runs[name].steps += part.steps
            runs[name].spent += part.spent
    return runs


def speeds(run: Runs, dense: Runs) -> dict[str, Any]:
    ratios = sorted(run.against(dense))
    return {"speed": run.speed(dense), "quartiles": [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]], "pairs": len(ratios)}


def keep(out: Path, row: dict[str, Any]) -> None:
    with out.open("a", encoding="utf-8") as f:
        f.write(json.dumps(row, sort_keys=True) + "\n")


def once_more(a: argparse.Namespace, model: Path, prompts: list[torch.Tensor]) -> None:
    """The rows of the last run of as many threads, with new speeds: as rows of a run of their own that says of which it is (`of`)."""
    every = [json.loads(line) for line in a.out.read_text().splitlines()]
    every = [r for r in every if (r["model"], r["threads"]) == (a.name, torch.get_num_threads())]
    rows = [r for r in every if every and r.get("began") == every[-1].get("began")]
    hashes = {p.parent: json.loads(p.read_text())["plan_hash"] for p in (a.work / "models").glob("*/trimtab.json")}
    folders = [next((d for d, h in sorted(hashes.items()) if h == r["plan_hash"]), None) for r in rows]
    if not rows or None in folders:
        raise SystemExit(f"the models of the last run with {torch.get_num_threads()} threads are not all in {a.work}")
    decoders = {str(d): open_decoder(d) for d in folders if d}
    runs = in_parts({**dense_decoders(model), **decoders}, prompts)
    base, began = fastest_dense(runs), time.strftime("%Y-%m-%d %H:%M:%S")
    for row, where in zip(rows, folders, strict=True):
        new = speeds(runs[str(where)], runs[base])
        print(f"{row['setting']:<9} {row['recipe']:<9} {new['speed']:.3f} x, was {row['speed']:.3f} (told {row['told']:.3f})")
        keep(a.out, {**row, **new, "baseline": base, "of": row.get("of", row["began"]), "began": began, "machine": machine(),
                     "date": time.strftime("%Y-%m-%d")})


@torch.no_grad()
def losses(net: Network, text: list[data.Batch], scratch: Path) -> list[float]:
    """Of every sequence the mean loss of its next tokens, in nats, as a proof has it."""
    found: list[float] = []
    for k in range(0, len(text), ROWS):
        ids = torch.cat([batch["input_ids"] for batch in text[k:k + ROWS]])
        stream = Stream(net, [{"input_ids": ids}], math.inf, scratch)
        for i in range(net.n_blocks):
            stream.step(i)
        found += [float(torch.nn.functional.cross_entropy(stream.logits(0, r, 0, ids.shape[1] - 1), row[1:])) for r, row in enumerate(ids)]
    return found


if __name__ == "__main__":
    main()
