"""Plant bugs, one at a time, and see whether the tests notice.

    python tools/mutate.py [--only SUBSTRING] [--jobs N]

Every bug goes into a copy of the repository in a temporary directory; the working tree is not touched. A bug in a
method file is hunted by the laws, worked examples and slow oracles of the methods in that file, any other bug by the
tests it names. Exit 0: all killed. 1: some survived. 2: a text to replace is not there (exactly once), or the tests
are red before any bug.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("src", "tests", "tools", "pyproject.toml")  # what the tests need of the repository
TIMEOUT = 600  # seconds; a bug that makes the tests hang is noticed, too
FORKS = get_context("forkserver")  # importing torch takes longer than most hunts: it is done once
METHOD_TESTS = ("tests/test_laws.py", "tests/test_cases.py", "tests/slow")


@dataclass(frozen=True)
class Bug:
    """Replace `old` by `new` in `file` (under src/trimtab). `tests`: pytest arguments, for files that hold no method."""

    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"src/trimtab/{self.file}"

    def arguments(self, source: str) -> list[str]:
        if self.tests:
            return list(self.tests)
        axis = self.file.split("/")[1]
        names = [n.rstrip("_") for n in re.findall(rf'@method\("{axis}".*?\ndef (\w+)\(', source, re.S)]
        return [*METHOD_TESTS, "-k", " or ".join(f"{axis}/{n} or test_{n}" for n in names)]


SOLVERS = ("tests/test_laws.py", "tests/slow", "-k", "repair or sparsegpt or admm or nettrim or oracles")
BUDGETS = ("tests/test_laws.py", "tests/test_cases.py", "-k", "budget")
UNITS = ("tests/test_laws.py", "tests/test_cases.py", "-k", "unit or select")
STATS = ("tests/test_laws.py", "-k", "stat")
SPEC = ("tests/line/test_spec.py",)
SELL = ("tests/runtime/test_kernels.py", "tests/runtime/test_modules.py", "-k", "few_single or nothing or long_rows_of_few")
GRIDS = ("tests/test_laws.py", "tests/test_cases.py", "-k", "grid")
RANGES = ("tests/line/test_quantise.py", "-k", "surprise")
FOLDS = ("tests/line/test_families.py", "-k", "scale or folded")
MOVES = ("tests/line/test_families.py", "-k", "moved")
CENTRED = ("tests/line/test_inputs.py", "-k", "centred")
QUANTISE = ("tests/line/test_quantise.py", "-k", "awq")
CODES = ("tests/runtime/test_kernels.py", "-k", "ternary or codes")
QUALITY = ("tests/line/test_proof.py", "-k", "quality or masked or cosine")
WORDS = ("tests/line/test_proof.py", "-k", "verdict or words or sizes")
SKIPS = ("tests/line/test_proof.py", "-k", "skip")
FAMILIES = ("tests/line/test_families.py", "-k",
            "(phi3 or gpt2 or gpt_neox or mixtral) and (cover or fused or streamed or unmodified or gradients)")
TRIM = ("tests/line/test_trim.py", "-k", "two_passes or global_budget or parts_hold")
RESUME = ("tests/line/test_trim.py", "-k", "killed_at_random and sparsegpt")
PLAN = ("tests/line/test_plan.py",)
ROTATION = ("tests/line/test_rotation.py",)
CUTS = ("tests/line/test_structure.py",)
SIZES = ("tests/line/test_subclone.py",)
TURNS = ("tests/line/test_wiring.py", "-k", "turned or slicegpt")
FUSES = ("tests/line/test_wiring.py", "-k", "fusion")
SHARES = ("tests/line/test_sharing.py",)
GATES = ("tests/test_laws.py", "tests/test_cases.py", "tests/line/test_gates.py", "tests/line/test_routers.py",
         "-k", "gate or router or sentence or step")
COLUMNS = ("tests/runtime/test_gates.py", "tests/runtime/test_kernels.py", "-k", "gate or columns")
ACIP = ("tests/line/test_acip.py",)
BATCHING, SERVER = ("tests/serve/test_batching.py",), ("tests/serve/test_server.py",)
COMMAND = ("tests/serve/test_command.py", "-k", "not signal")
ENTRYWISE = ("tests/line/test_fedpara.py",)
SUMMARY = ("tests/test_laws.py", "-k", "summary")
FRONT = ("tests/search/test_front.py",)
TRIALS = ("tests/search/test_trials.py",)
SPACE = ("tests/search/test_space.py",)
ASSEMBLED = ("tests/search/test_search.py", "-k", "assembled or bytes or alike")
JUDGED = ("tests/search/test_search.py", "-k", "within or near or no_more_text or answer")
TIMED = ("tests/search/test_search.py", "-k", "layout or told or prompts or machine or race or left_of_the_time")
FOUND = ("tests/search/test_search.py", "-k", "folder or stopped or goes_on or runtimes or once or cannot_be")

BUGS = [
    # --- statistics
    Bug("methods/stat/moments.py", "x.float().square().sum(0)", "x.float().abs().sum(0)", "in_sq without the square"),
    Bug("methods/stat/moments.py", "return x.T @ x", "return x.T @ x.roll(1, 0)", "gram of neighbouring tokens"),
    Bug("methods/stat/moments.py", "x = x.float()", "x = x * 1", "dtype lost: gram summed in half precision"),
    Bug("methods/stat/moments.py", "amax(0)", "amin(0)", "the smallest for the largest"),
    Bug("methods/stat/activations.py", "mean=True, done=torch.sqrt", "mean=True", "act_norm without the root"),
    Bug("methods/stat/activations.py", 'of="mid"', 'of="input"', "act_norm of the site's own input"),
    Bug("methods/stat/activations.py", ".sum().reshape(1)\n\n\n@method(\"stat\", of=\"block\"",
        ".mean().reshape(1)\n\n\n@method(\"stat\", of=\"block\"", "mean of means: batch size counts"),
    Bug("methods/stat/gradients.py", "g.float().square()", "g.float().abs()", "grad_sq without the square"),
    Bug("methods/stat/gradients.py", 'of="grad", merge="stack"', 'of="grad", merge="sum"', "gradients summed, not kept"),
    Bug("core/calibrate.py", "self.sums[at] / self.counts[at], 1", "self.sums[at] / max(self.counts.values()), 1",
        "one count for all", STATS),
    Bug("core/calibrate.py", "self.sums[at] += value", "self.sums[at] = value", "last batch only", STATS),
    Bug("core/calibrate.py", "self.sites[site.consumer].input if site.consumer in self.sites else site.input",
        "site.input", "nobody looks at the consumer's input", STATS),
    # --- units
    Bug("methods/select.py", "descending=True", "descending=False", "keeps the worst of a short row", UNITS),
    Bug("methods/select.py", "torch.argsort(s, dim=-1, descending=True, stable=True)",
        "n - 1 - torch.argsort(s.flip(-1), dim=-1, descending=True, stable=True)", "ties of a short row to the higher index", UNITS),
    Bug("methods/select.py", "kthvalue(n - k + 1,", "kthvalue(n - k + 2,", "threshold one too high", UNITS),
    Bug("methods/select.py", "tied.cumsum(-1, dtype=torch.int32) <= room", "tied", "all ties kept", UNITS),
    Bug("methods/select.py", "tied.cumsum(-1, dtype=torch.int32)", "tied.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)",
        "ties to the higher index", UNITS),
    Bug("methods/unit/element.py", "round(keep * s.shape[1])", "round((1 - keep) * s.shape[1])", "kept read as dropped"),
    Bug("methods/unit/element.py", "round(keep * s.shape[1])", "int(keep * s.shape[1])", "off by one: rounded down"),
    Bug("methods/unit/element.py", "top(s.T, round(keep * s.shape[0])).T", "top(s, round(keep * s.shape[1]))",
        "column along the wrong axis"),
    Bug("methods/unit/nm.py", 'lines = s if dim == "in" else s.T', "lines = s", "n:m along the wrong dimension"),
    Bug("methods/unit/nm.py", "-1, m), n)", "-1, m), m - n)", "n dropped instead of n kept"),
    Bug("methods/unit/nm.py", "if lines.shape[1] % m:", "if False:", "a remainder is not refused"),
    Bug("methods/unit/block.py", "square().reshape", "reshape", "block sums instead of norms"),
    Bug("methods/unit/block.py", "rows, cols = rows or b, cols or b", "cols, rows = rows or b, cols or b",
        "rows and columns of a block swapped"),
    # --- scores
    Bug("methods/score/wanda.py", "in_sq.sqrt()", "in_sq", "Wanda without the root"),
    Bug("methods/score/wanda.py", "* in_sq.sqrt()", "", "Wanda forgets the input"),
    Bug("methods/score/magnitude.py", "w.float().abs()", "w.float()", "sign kept"),
    Bug("methods/score/dass.py", "act_norm[:, None] ** alpha", "act_norm[:, None]", "DaSS without its exponent"),
    Bug("methods/score/gblm.py", "+ scale * (SEQ", "- scale * (SEQ", "sign of the gradient term"),
    Bug("methods/score/obs.py", "/ torch.cholesky_inverse(lower).diagonal().float()", "* h.diagonal().float()",
        "diagonal of H for that of its inverse"),
    Bug("methods/score/obs.py", "h.diagonal().add_(damp * torch.where(mean > 0, mean, 1.0))", "pass", "damping left out"),
    Bug("methods/score/obs.py", "h = gram.to(torch.float64, copy=True)", "h = gram", "the caller's statistic is overwritten"),
    Bug("methods/score/obert.py", "if whole < w.numel():", "if False:", "remainder of the last block lost"),
    Bug("methods/score/obert.py", "part.mT @ part / len(g)", "part.mT @ part", "sum over sequences for the mean"),
    Bug("methods/score/taylor.py", "(w.float() * grad).abs()", "w.float().abs() * grad.abs().mean()", "mean gradient"),
    Bug("methods/score/random.py", "torch.rand(w.shape, generator=g, ", "torch.rand(w.shape, ", "the global generator"),
    # --- budgets
    Bug("methods/budget/uniform.py", "dict.fromkeys(scores, target)", "dict.fromkeys(scores, 1 - target)", "inverted"),
    Bug("methods/budget/owl.py", "target + raised[k] - mean + by, 0.0", "target + raised[k] + by, 0.0", "not centred"),
    Bug("methods/budget/owl.py", "2 * spread * (v - low)", "2 * spread * (high - v)", "more outliers, fewer kept"),
    Bug("methods/budget/owl.py", "above(outlier * mean)", "above(outlier)", "threshold not relative to the mean"),
    Bug("methods/budget/lamp.py", "sq.flip(0).cumsum(0).flip(0)", "sq.cumsum(0)", "sums what is smaller"),
    Bug("methods/budget/global_.py", "first = len(from_top) - at ", "first = len(from_top) - at - 1 ", "one bin too far"),
    Bug("methods/budget/global_.py", "counts[i] += 1", "counts[i] += 0", "the remainder is lost"),
    Bug("methods/budget/teal.py", "if not best or found < least", "if not best or found > least", "drops where it costs most", BUDGETS),
    Bug("methods/budget/teal.py", "drops[n] / sizes[n])})", "drops[n] / total)})", "all sites lose the same share", BUDGETS),
    Bug("methods/budget/teal.py", "else even", "else shares", "worse than one share for all", BUDGETS),
    Bug("methods/budget/teal.py", "added.get((n, drop), 0.0)", "added.get((n, step * total), 0.0)",
        "a small last step is not tried", BUDGETS),
    Bug("methods/budget/redundancy.py", "at: 1 - sum(c) / len(c)", "at: sum(c) / len(c)", "redundant sublayers keep more"),
    Bug("core/types.py", ".floor().long() + 1", ".floor().long()", "histogram edge off by one", SUMMARY),
    Bug("core/types.py", "self.hist[max(b, 0) + 1:]", "self.hist[max(b, 0):]", "the threshold's own bin counted", SUMMARY),
    # --- edits and solvers
    Bug("methods/edit/mask.py", "w * mask", "w * ~mask", "kept and dropped swapped"),
    Bug("methods/edit/sparsegpt.py", "goal * end / w.shape[1] - have", "goal * (end - begin) / w.shape[1]",
        "rounding of one block not made good in the next"),
    Bug("methods/edit/sparsegpt.py", "unit(s * mask[:, a:b], keep) & mask[:, a:b]", "unit(s, keep)",
        "n:m brings back what an earlier pass dropped"),
    Bug("methods/edit/admm.py", "v0 = w.float() * n", "v0 = w.float()", "weights not normalised"),
    Bug("methods/edit/admm.py", "(1 - (t + 1) / (last + 1)) ** 3", "(1 - (t + 1) / (last + 1))", "linear ramp for cubic"),
    Bug("methods/edit/nettrim.py", "* x.sign() * mask", "* mask", "signs lost in the shrinkage"),
    Bug("methods/edit/chita.py", "curve += lam", "pass", "ridge left out of the curvature"),
    Bug("methods/edit/chita.py", "(ai @ (wi * ~oi))", "(ai @ (wi * oi))", "kept for dropped in the refit"),
    Bug("methods/solvers.py", "d += damp * d.mean()", "d += 0 * d.mean()", "damping left out", SOLVERS),
    Bug("methods/solvers.py", "- final, alpha=-1)", "- final, alpha=1)",
        "sign of the OBS update", SOLVERS),
    Bug("methods/solvers.py", "        if a:\n            cur", "        if False:\n            cur",
        "no block sees the one before", SOLVERS),
    Bug("methods/solvers.py", "torch.where(lower(w, cand, new.w, gram)[:, None], cand, new.w)", "cand",
        "a repair that makes it worse is taken", SOLVERS),
    Bug("methods/solvers.py", "new + than - 2 * w", "new - than", "half of what the lower error is told by", SOLVERS),
    Bug("methods/solvers.py", "h[a:, a:b] -= linear", "h[a:, a:b] += linear", "strips add what they should take off", SOLVERS),
    Bug("methods/solvers.py", "        if bool(info):", "        if False:", "no damping where it is needed", SOLVERS),
    Bug("methods/products.py", "if x.dtype == w.dtype == torch.float32 and x.is_cpu and dense", "if x.is_cpu and dense",
        "other types go where only float32 may", SOLVERS),
    Bug("methods/solvers.py", "rhs = w.double() @ h", "rhs = w.double() @ gram.double()", "damping biases the refit", SOLVERS),
    Bug("methods/solvers.py", "u = x.sub_(z)", "u = x.sub_(z).mul_(0.5)", "dual step halved", SOLVERS),
    # --- formats
    Bug("methods/format/bitmask.py", "in_order(stuff)[kept]", "in_order(stuff).flip(1)[kept]", "values in another order than their bits"),
    Bug("methods/format/panels.py", "return new.w != 0", "return new.w > 0", "negative weights lost without a mask"),
    Bug("methods/format/bitmask.py", "-(-stored // LINE) * LINE", "stored", "values not filled up as the formula says"),
    Bug("methods/format/panels.py", "codes[..., f, :, :] << bits * f", "codes[..., f, :, :] << bits", "fields of a word overlap"),
    Bug("methods/format/bitmask.py", ".masked_fill_(hole, 0)", "", "a hole stands for code 0, not for the zero point"),
    Bug("methods/format/panels.py", "whole.mul_(256).add_(3 ** TRITS - 1)", "whole.mul_(256)", "digits rounded down to the one below"),
    Bug("methods/codes.py", "return each.abs().sum(-1) /", "return each.abs().amax(-1) /",
        "ternary scale of the largest, not of the mean", CODES),
    Bug("methods/codes.py", "better = off < least", "better = off > least", "the range of the largest error", GRIDS),
    Bug("methods/codes.py", "hist[0] = 0", "pass", "zeros decide the range by entropy", RANGES),
    Bug("methods/codes.py", "seen[-1] += hist[end:].sum()", "pass", "what is clipped does not count", RANGES),
    Bug("methods/codes.py", "(self.table[1:] + self.table[:-1]) / 2", "self.table[1:]", "rounded down to the step below", GRIDS),
    Bug("methods/edit/gptq.py", "i % group == 0", "i % group == 1", "groups are fitted one column late"),
    Bug("methods/edit/gptq.py", "grid((cur[j:j + n] if", "grid((w.T[i:i + n] if", "groups fitted to what the weights were"),
    Bug("methods/edit/gptq.py", "else cur[j] * kept[begin + j])", "else cur[j])", "dropped weights come back"),
    Bug("methods/rewrite/awq.py", "weight() / s", "weight()", "the scale is not undone before it is judged"),
    Bug("methods/repair/clip.py", "better = cost < least", "better = cost > least", "the worst range of a group"),
    Bug("methods/repair/clip.py", "wins = lower(w, found.weight(), new.w, gram)", "wins = torch.ones(len(w), dtype=torch.bool)",
        "a row that gets worse is taken"),
    Bug("network/graph.py", "n // (h // kv) * d + c", "n % kv * d + c", "values of another head are scaled", FOLDS),
    Bug("network/stream.py", "torch.where((after != 0) & (before != 0), before / after, torch.ones_like(by))", "by",
        "the norm's rounding is lost", FOLDS),
    Bug("core/edits.py", "any(s.name not in owner for s in fold.readers)", "False", "a reader that no pass covers is scaled", QUANTISE),
    Bug("core/edits.py", "refit[s.name].of(its(s)) if s.name in refit else its(s)", "its(s)",
        "statistics of inputs as they were", QUANTISE),
    Bug("methods/rewrite/channelwise.py", "(sample.amin(0) + sample.amax(0)) / 2", "sample.amax(0) / 2", "the most for the middle"),
    Bug("methods/stat/moments.py", "value - 2 * mean * z", "value - mean * z", "a moved square with half the product"),
    Bug("network/stream.py", "float() @ z)", "float() @ -z)", "biases take the shift twice, not back", MOVES),
    Bug("network/stream.py", "z = before - p.detach().float()", "pass", "the rounding of a norm's bias is lost", MOVES),
    Bug("network/stream.py", "in params and all(self.has_bias(r)", "in params and any(self.has_bias(r)",
        "an input moves though a reader has no bias", MOVES),
    Bug("core/edits.py", "its, changed = moved(its, z), changed", "changed = changed", "scales of inputs as they lay", CENTRED),
    Bug("core/edits.py", "stats if self.shift is None else moved(stats, self.shift)", "stats", "statistics of inputs as they lay",
        CENTRED),
    Bug("methods/format/nm.py", "return (m - 1).bit_length()", "return m.bit_length()", "one index bit too many"),
    Bug("methods/format/nm.py", "if most > n:", "if most > m:", "a group that keeps too many loses the rest"),
    Bug("methods/format/nm.py", "8: ((0, 2), (2, 1))", "8: ((0, 2),)", "places of 8 cut to two bits"),
    Bug("methods/format/nm.py", "zip(planes, PLANES", "zip(planes[::-1], PLANES", "planes of places in the wrong order"),
    Bug("methods/format/sell.py", "first.clamp(max=max(0, inputs - WINDOW))", "first", "a window reaches beyond the inputs", SELL),
    Bug("methods/format/sell.py", "at = at + taken.sum(1)", "at = at + EACH", "what lies behind the window is lost"),
    Bug("methods/format/sell.py", "rows[slot.clamp(min=0)].masked_fill(none, 0)", "rows[slot.clamp(min=0)]", "fill is a weight once more"),
    Bug("methods/format/sell.py", "column < (window + WINDOW)", "column <= (window + WINDOW)", "an entry just behind its window", SELL),
    Bug("core/pack.py", "< FEW *", "> FEW *", "many weights in steps, few with bits", SELL),
    Bug("methods/format/bsr.py", "flatten(2).any(-1)", "flatten(2).all(-1)", "a block with one zero is lost"),
    Bug("methods/format/bsr.py", "held.sum(1)", "held.sum(0)", "row pointers count columns"),
    Bug("methods/edit/svd.py", "root[:, None] * vt[:r]", "vt[:r]", "singular values on one side only"),
    Bug("methods/budget/acip.py", "(-s, i, n)", "(s, i, n)", "what went first is kept"),
    Bug("methods/budget/acip.py", "        if taken > target * total:\n            break", "        if False:\n            break",
        "no target"),
    Bug("methods/budget/acip.py", "max(1, k) * sum", "k * sum", "a rank of nothing"),
    Bug("methods/budget/acip.py", "before.clamp_max(0) - 1", "before.clamp_max(0)", "when it went is forgotten", ACIP),
    Bug("methods/budget/acip.py", "GROWTH * penalty or", "penalty or", "the penalty does not grow", ACIP),
    Bug("methods/budget/acip.py", '.mul_(own[name]["mask"] > 0)', "", "what is gone comes back", ACIP),
    Bug("core/line.py", 'if source := knobs.pop("source"):', 'if knobs.pop("source") is None:', "trained again", ACIP),
    Bug("core/line.py", "len(its) != min(s.shape) or not all", "not all", "another network's ranking is taken", ACIP),
    Bug("methods/edit/fedpara.py", "2 * rank_of(w.shape, keep, rank) if rank", "rank_of(w.shape, keep, rank) if rank", "half the rank"),
    Bug("methods/edit/fedpara.py", "(x / scale).float()", "x.float()", "the inputs' sizes stay in the factors"),
    Bug("methods/edit/fedpara.py", "slope.mul(first).mul_(2 / size), slope.mul(second)",
        "slope.mul(second).mul_(2 / size), slope.mul(first)", "the slope of one product goes to the other"),
    Bug("methods/format/entrywise.py", "return first * second", "return first + second", "products added"),
    Bug("methods/entrywise.py", "return rank - rank // 2, rank // 2", "return rank // 2, rank - rank // 2", "the second has one more",
        ENTRYWISE),
    Bug("runtime/native.py", 'torch.bfloat16 if packed.type == "bf16" else torch.float32', "torch.float32", "twice the bytes that are read",
        ENTRYWISE),
    Bug("prove/size.py", "    if not p.factors:\n        yield before, p\n",
        "    if not p.factors or p.format == 'entrywise':\n        yield before, p\n        return\n", "products counted as weights",
        ENTRYWISE),
    Bug("methods/format/lowrank.py", "each = (dense(Change(factors.right)), dense(Change(factors.left)))",
        "each = (dense(Change(factors.right * 2)), dense(Change(factors.left)))", "a factor is not what was given"),
    # --- the line
    Bug("core/spec.py", "/ (100 if text.endswith", "/ (1 if text.endswith", "per cent read as a share", SPEC),
    Bug("core/spec.py", 'scope in ("all", site.group)', 'scope in ("all",)', "a scope that covers nothing", SPEC),
    Bug("core/spec.py", "decided |= dict.fromkeys((_place(m), *m.joint), name)", "decided |= {_place(m): name}",
        "what a joint method decides is decided twice", SPEC),
    Bug("core/edits.py", "torch.ones_like(w, dtype=torch.bool) if prior is None else prior",
        "torch.ones_like(w, dtype=torch.bool)", "a joint edit does not hear of an earlier pass", PLAN),
    Bug("core/edits.py", 'env["mask"] &= prior', "pass", "dropped entries are kept in the mask", PLAN),
    Bug("core/edits.py", "net.set_weight(module, s, change.w)", "net.set_weight(module, s, w)", "nothing is edited", TRIM),
    Bug("core/edits.py", "net.set_weight(module, s, change.w)",
        "net.set_weight(module, s, change.w if s is net.sites_of(i)[-1] else w)", "only a block's last site is edited", TRIM),
    Bug("core/line.py", "Summary.of(s, of(scores) if of else scores)", "Summary.of(net.sites[0], of(scores) if of else scores)",
        "every site is taken for the first", PLAN),
    Bug("core/line.py", "Summary.of(s, of(scores) if of else scores)", "Summary.of(s, scores)",
        "what a budget makes of scores is left out", PLAN),
    Bug("core/journal.py", "os.rename(self.out, old)", "shutil.rmtree(self.out)", "an earlier output is gone too soon",
        ("tests/line/test_journal.py",)),
    Bug("core/line.py", "here = sweep + 1", "here = sweep", "a resumed run sees blocks as they were", RESUME),
    # --- smaller shapes
    Bug("core/structure.py", "each = (each / (h // kv))", "each = each", "shared keys count for every query head", CUTS),
    Bug("core/structure.py", "share = 1 - (1 - target) * spanned / mine", "share = target", "what is not taken is not made up for", CUTS),
    Bug("core/structure.py", "int(share * count / step * (1 + 1e-9)) * step", "round(share * count / step + 0.5) * step",
        "rounding keeps more than was asked", CUTS),
    Bug("core/structure.py", "shares[s.name] - over.get(s.block, 0.0) / mine", "shares[s.name]", "neurons do not make up for heads", CUTS),
    Bug("core/structure.py", "max(of_role)", "min(of_role)", "what fires goes where all layers are alike", CUTS),
    Bug("core/structure.py", "if n >= share * count * (1 - 1e-9)", "if n >= share * count * (1 - 1e-9) - step",
        "what fires goes to make a round number", CUTS),
    Bug("core/structure.py", "shares |= {s.name: 0.0 for s in together[k]}", "shares |= {together[k][0].name: 0.0}",
        "a layer loses its attention alone", CUTS),
    Bug("core/structure.py", "for i, groups in empty.items() if groups >=", "for i, groups in empty.items() if groups <=",
        "a block that has lost one of its sublayers goes whole", CUTS),
    Bug("network/surgery.py", "self.rows |= {s.name: kept if s.role == \"q\" else groups for s",
        "self.rows |= {s.name: kept for s", "keys go by the number of query heads", CUTS),
    Bug("network/surgery.py", "if biased := [s for s in self.sites if graph.bias_of(s) == name]:", "if biased := []:",
        "biases stay as long as they were", CUTS),
    Bug("network/surgery.py", "for n in net.family.norms for k in", "for n in net.family.norms[:1] for k in",
        "the second norm keeps its channels", CUTS),
    Bug("network/surgery.py", "return torch.zeros(entries[file][1], dtype=entries[file][0])\n        if file not in where:",
        "return torch.ones(entries[file][1], dtype=entries[file][0])\n        if file not in where:", "what is gone is no zero", CUTS),
    Bug("network/surgery.py", "new[key] = [listed[i] for i in stay]", "new[key] = listed[:len(stay)]", "kinds of layers shift", CUTS),
    Bug("methods/edit/fuse.py", "down = centre[:, begin:].T * size", "down = centre[:, begin:].T", "of neurons that are alike one counts"),
    Bug("core/resize.py", "math.sqrt(have[kind] / to[kind])", "math.sqrt(to[kind] / have[kind])", "the factor upside down", SIZES),
    Bug("core/resize.py", "not (step.method.facts[\"of\"] == \"input\" and s.input in seen)", "True",
        "an input counts for every reader", SIZES),
    # --- rewiring and sharing
    Bug("methods/wiring/fusion.py", 'torch.cat([m[role] * m["norm"] for m in mlps])', "torch.cat([m[role] for m in mlps])",
        "the weights of norms are lost"),
    Bug("methods/wiring/principal.py", ".flip(1)", "", "the smallest directions first"),
    Bug("methods/wiring/rms.py", "writes - writes.mean(0)", "writes - writes.mean()", "one mean of all tokens"),
    Bug("methods/wiring/parallel.py", '"damage": -damage.float()', '"damage": damage.float()', "where it costs most"),
    Bug("methods/wiring/offline.py", "-(sizes.log() * near)", "(sizes.log() * near)", "multiplied by the size"),
    Bug("core/rewire.py", "return q.T @ p.detach().double()", "return p.detach().double()", "what writes the stream is not turned", TURNS),
    Bug("core/rewire.py", "return (p.detach().double() * weight(module, s.input)) @ q", "return p.detach().double() @ q",
        "the weights of norms are not taken by what reads them", TURNS),
    Bug("core/rewire.py", "groups[run[begin]] = run[begin:begin + count]", "groups[run[begin]] = run[begin:begin + 1]",
        "what was fused is left out", FUSES),
    Bug("core/sharing.py", "w[int(head) * n:(int(head) + 1) * n] = weight(sites[donor]).float()[int(its) * n:(int(its) + 1) * n]",
        "w[int(head) * n:(int(head) + 1) * n] = weight(sites[donor]).float()[int(head) * n:(int(head) + 1) * n]",
        "the head of the same number", SHARES),
    Bug("core/pack.py", "if e.end - e.begin >= SMALL else n", "if False else n", "nothing is stored once", SHARES),
    Bug("core/pack.py", "(sums[n], e.dtype, e.shape)", "(e.dtype, e.shape)", "what is of one size is taken for equal", SHARES),
    Bug("core/rotation.py", "found.turned[bias] = its.of", "pass", "the bias of v stays as it was", ROTATION),
    Bug("core/rotation.py", "turned[bias] = turn.of", "pass", "biases of what writes the stream stay as they were", ROTATION),
    Bug("core/rotation.py", "turn, weight(last).float() / plain", "turn, weight(last).float()",
        "the signs of the stream stay in the head", ROTATION),
    Bug("core/rotation.py", "if not torch.equal(left.sign(), plain.sign()):", "if False:",
        "another rotation is taken for this one", ROTATION),
    Bug("core/rotation.py", "rtol=NEAR, atol=0", "rtol=10, atol=10", "a norm that could not be left out is", ROTATION),
    Bug("core/measured.py", "for s, w in before.items():", "for s, w in {}.items():", "what was tried stays", PLAN),
    Bug("core/measured.py", "self.others |= begun", "self.others = begun", "only the last block's are measured", PLAN),
    Bug("core/measured.py", "self.net.run(twin, i, x", "self.net.run(module, i, x", "what is tried is not there", PLAN),
    Bug("core/measured.py", "slice(None) if real is None else real", "slice(None)", "padding counts", PLAN),
    Bug("core/measured.py", "(name, keep) not in self._known", "name not in {n for n, _ in self._known}", "one share for all trials", PLAN),
    Bug("core/measured.py", "self.store[b] = y", "pass", "every block is tried on what the first one sees", PLAN),
    Bug("core/line.py", "if p.tries):  # whether", "if False):  # whether", "bad knobs are seen when the output is begun", PLAN),
    # --- gates
    Bug("methods/gates.py", "~(s <= self.threshold.to(s.device))", "s > self.threshold.to(s.device)",
        "what is no number is left out", GATES),
    Bug("methods/gates.py", "s = s if self.scale is None else s * self.scale.to(s.device)", "s = s", "no input has a scale", GATES),
    Bug("methods/gates.py", "round((1 - keep) * len(flat))", "round(keep * len(flat))", "the share kept is left out", GATES),
    Bug("methods/gates.py", "passed[..., self.prompt:, :]", "passed[..., 1:, :]", "the rest of the prompt is gated, too", GATES),
    Bug("methods/gates.py", "far.argmin(1)", "far.argmax(1)", "the core of the least alike cluster", GATES),
    Bug("methods/gates.py", "-(-CORE[0] * (v > 0)", "(CORE[0] * (v > 0)", "a share rounded down", GATES),
    Bug("methods/gates.py", "self.counts[len(v) - 1]", "self.counts[0]", "as many for every number of sequences", GATES),
    Bug("methods/gates.py", "s.clamp_min(0).sum(0)", "s.sum(0)", "what speaks against a neuron counts", GATES),
    Bug("methods/gates.py", "repeat_interleave(self.group, -1)", "repeat(*[1] * (s.ndim - 1), self.group)",
        "units are not side by side", GATES),
    Bug("methods/gates.py", ".amax(-1)", ".mean(-1)", "the mean of pooled scores", GATES),
    Bug("methods/gate/cats.py", "passing(hidden_gate.abs(), keep)", "passing(hidden_gate, keep)", "a threshold of signed values"),
    Bug("methods/gate/chess.py", "hidden_gate.abs() * scale", "hidden_gate.abs()", "one threshold for all channels"),
    Bug("methods/gate/wina.py", "norm(dim=0)", "abs().amax(0)", "the largest of a column for its norm"),
    Bug("methods/gate/wina.py", "w.float().norm(dim=0)", "w.float().norm(dim=1)", "norms of rows"),
    Bug("methods/gate/core.py", "top(seen, count)", "top(centres, count)", "the core of a cluster's sentences, not of their tokens"),
    Bug("methods/gate/heads.py", "pool=count // groups", "pool=1", "a group's heads have one score"),
    Bug("methods/gate/heads.py", "outputs.norm(dim=2)", "outputs.sum(2)", "heads by their sum"),
    Bug("methods/gate/predictor.py", "passing(scores, keep)", "passing(scores, 1 - keep)", "as many as should be left out"),
    Bug("methods/gate/polar.py", "stable=True).indices", "stable=True).indices.flip(1)", "the smallest scores first"),
    Bug("methods/routers.py", "(torch.sigmoid(scores(mine)) - its)", "torch.sigmoid(scores(mine))",
        "a router learns that nothing is active", GATES),
    Bug("methods/routers.py", "h.abs() > passing(h.abs(), keep).clamp_min(0)", "h.abs() > passing(h.abs(), keep)",
        "zeros are active", GATES),
    Bug("methods/budget/teal.py", "shares[best] - drops[best] / sizes[best]), least", "shares[best] - drops[best] / total), least",
        "a share of all weights"),
    Bug("methods/format/columns.py", "low | high << 4", "high | low << 4", "halves of a byte swapped"),
    Bug("methods/format/columns.py", "repeat_interleave(p.group, 0)[:inputs]", "repeat(p.group, 1)[:inputs]", "scales of groups in turn"),
    Bug("runtime/decoder.py", '"count": g.count or None', '"count": None if g.threshold is None else g.count or None',
        "a count is lost on the way", GATES),
    Bug("runtime/native.py", "x = x * self.gate.mask(self._scored(x, scored))", "pass", "a packed map reads everything", COLUMNS),
    Bug("network/stream.py", "whole.split(g.together or len(whole))", "whole.split(1)", "every sequence decides for itself", GATES),
    Bug("core/line.py", "if passes[-1] is not gates[0]:", "if False:", "a gate of weights that go on changing", GATES),
    Bug("core/line.py", '(by := gate.method.facts["by"]) != "token":', '(by := "") and by != "token":',
        "what is packed has gates it cannot run", GATES),
    # --- serve
    Bug("serve/batching.py", '"left" if job.left else ', "", "who left keeps the row", BATCHING),
    Bug("serve/batching.py", "room -= len(parts[row])", "pass", "as many tokens of prompts as there are prompts", BATCHING),
    Bug("serve/batching.py", "room = BESIDE if", "room = 0 if", "nobody's prompt is read while others go on", BATCHING),
    Bug("serve/batching.py", "self._session.begin(row)", "pass", "keys and values of who is done are kept", BATCHING),
    Bug("serve/batching.py", "job.top_p, job.seed)", "job.top_p, row)", "a row's own draws", BATCHING),
    Bug("serve/batching.py", ">= self._places", "> self._places", "one more than there is room for", BATCHING),
    Bug("serve/batching.py", "text + job.until.rest()", "text", "what could have begun a stop text is lost", BATCHING),
    Bug("serve/guard.py", "not secrets.compare_digest(token.strip(), self._token)", "not token", "any token", SERVER),
    Bug("serve/guard.py", "if name not in self._hosts:", "if not name:", "any host", SERVER),
    Bug("serve/guard.py", "self._held -= sum(map(len, parts))", "pass", "what has arrived counts as arriving", SERVER),
    Bug("serve/app.py", "            self._leave()", "            pass", "who leaves a stream is answered on", SERVER),
    Bug("serve/app.py", "asyncio.to_thread(model.encode, prompt, False)", "asyncio.to_thread(model.encode, prompt, True)",
        "two beginnings of a chat", SERVER),
    Bug("serve/app.py", "min(most, m.context - len(ids) + 1)", "most", "answers beyond the context", SERVER),
    Bug("serve/server.py", "if not is_loopback(a.host) and not token:", "if False:", "everybody may ask", COMMAND),
    # --- network
    Bug("core/types.py", "w = w.T if self.transposed else w", "w = w", "a transposed site is read as it lies", FAMILIES),
    Bug("core/types.py", "else param.detach()[self.expert]\n        w = w.T", "else param.detach()[0]\n        w = w.T",
        "every expert is the first one", FAMILIES),
    Bug("network/graph.py", "n * 3 * d + j * d + k", "j * h * d + n * d + k", "fused rows by role, not by head", FAMILIES),
    Bug("network/graph.py", "[h * d, kv * d, kv * d]", "[total // 3] * 3", "grouped queries as wide as keys", FAMILIES),
    Bug("network/graph.py", 'if role in ("gate", "up") else None', 'if role == "gate" else None', "up feeds nothing", FAMILIES),
    # --- proof
    Bug("prove/quality.py", "ids[row, begin + 1:end + 1]", "ids[row, begin:end]", "a token predicts itself", QUALITY),
    Bug("prove/quality.py", "counted[row, begin + 1:end + 1]", "counted[row, begin:end]", "padding counted", QUALITY),
    Bug("prove/quality.py", "logs[0].exp() * (logs[0] - logs[1])", "logs[1].exp() * (logs[1] - logs[0])",
        "KL the other way round", QUALITY),
    Bug("prove/quality.py", "same / max(count, 1) if pair", "same / len(batches) if pair", "agreement over batches", QUALITY),
    Bug("prove/size.py", "torch.frombuffer(part, dtype=dtype) & magnitude", "torch.frombuffer(part, dtype=dtype)",
        "minus zero counted", WORDS),
    Bug("prove/proof.py", "recovery < min_recovery", "recovery > min_recovery", "the proof fails what is good", WORDS),
    Bug("prove/proof.py", "v * sizes[n] for n, v in own.items()", "v * sum(sizes.values()) / len(sizes) for n, v in own.items()",
        "a small site counts as much as a large one", SKIPS),
    Bug("prove/proof.py", "1 - keep if isinstance", "keep if isinstance", "what is computed is taken for what is skipped", SKIPS),
    Bug("prove/proof.py", '"reached": 1 - computed[n]', '"reached": computed[n]', "what is computed was skipped", SKIPS),
    Bug("prove/proof.py", "abs(d) > OFF", "d > OFF", "gates that skip less than asked are fine", SKIPS),
    Bug("prove/proof.py", 'r["min"] > 1', 'r["max"] > 1', "one lucky pair makes it faster", WORDS),
    # --- search
    Bug("search/front.py", "0, len(space.places) - 1))", "0, len(space.places)))", "a network of nothing is an answer", FRONT),
    Bug("search/front.py", "-np.inf, time - costs.beside))", "-np.inf, time))", "what the decoder does not see takes no time", FRONT),
    Bug("search/front.py", "goal = quick + 1e-4 * small", "goal = small + 1e-4 * quick",
        "the smallest, not the quickest, at a loss", FRONT),
    Bug("search/front.py", "math.exp(ABOUT * draw", "math.exp(0 * draw", "nothing is shaken", FRONT),
    Bug("search/front.py", "speed >= self.speed / SLACK)", "speed >= self.speed / 2)", "half the speed will do", FRONT),
    Bug("search/front.py", "if own not in seen and not any(", "if not any(", "the front has equals", FRONT),
    Bug("search/trials.py", "self.study.enqueue_trial(dict(c), user_attrs={\"by\": by}, skip_if_exists=True)", "pass",
        "what is queued is forgotten", TRIALS),
    Bug("search/trials.py", "state=state.FAIL)\n        study.enqueue_trial(", "state=state.FAIL)\n        dict(a=",
        "what a dead worker had begun is lost", TRIALS),
    Bug("search/trials.py", "made < least or until", "until", "not even the least is made", TRIALS),
    Bug("search/trials.py", "self.draw.random() < 0.5", "True", "parents are drawn blindly", TRIALS),
    Bug("search/space.py", "number = {i: k for k, i in enumerate(i", "number = {i: i for k, i in enumerate(i",
        "blocks behind one that is gone keep their numbers", SPACE),
    Bug("search/space.py", "sorted(passes.items(), key=lambda i: i[0][:2])", "passes.items()", "shapes are not cut first", SPACE),
    Bug("search/quality.py", ".div_(127)", ".div_(120)", "bytes of another scale", ASSEMBLED),
    Bug("search/quality.py", "if self.in_bytes and (group", "if (group", "float inputs are rounded", ASSEMBLED),
    Bug("search/quality.py", "self.net.as_said(module, i, parts)", "pass", "a gate is left open", ASSEMBLED),
    Bug("search/quality.py", "if mean + SURE * error <= most", "if mean <= most", "a loss is kept by luck", JUDGED),
    Bug("search/quality.py", "if mean - SURE * error > most", "if mean > most", "a loss is missed by bad luck", JUDGED),
    Bug("search/quality.py", "(a * (told - other) + e * mean)", "(e * (told - other) + a * mean)", "what is less sure weighs more", JUDGED),
    Bug("search/quality.py", "if pace and began + pace * runs > self.until", "if False", "judged for however long it takes", JUDGED),
    Bug("search/search.py", "t.rise <= NEAR * fits[0].rise", "True", "what lies far is run for the answer, too", JUDGED),
    Bug("search/search.py", "if p != HEAD): t  # of", "): t  # of", "with another head it is run twice", JUDGED),
    Bug("search/search.py", "if judge.within(t.choices, most)), front[low])", "if False), front[low])",
        "what lies farther is never quicker", JUDGED),
    Bug("search/timing.py", "names[::-1] if r % 2 else names", "names", "the same is always first", TIMED),
    Bug("search/timing.py", "over = r >= rounds and", "over = True or", "one round is enough", TIMED),
    Bug("search/timing.py", "rest[n] > (1 + ODD) * usual", "rest[n] > 100 * usual", "a slow layout is believed", TIMED),
    Bug("search/edited.py", "        if held <= limit:\n            return\n", "", "everything is forgotten", FOUND),
    Bug("search/edited.py", "order=\"dense\"", "order=\"sequential\"", "options see what others became", ASSEMBLED),
]


def copied(root: Path, where: Path) -> Path:
    """The repository `root` in `where`: code copied, everything large linked."""

    def copy(src: str, dst: str) -> None:
        if src.endswith((".py", ".toml")):
            shutil.copyfile(src, dst)
        else:
            os.symlink(src, dst)

    where.mkdir(exist_ok=True)
    for part in PARTS:
        if (root / part).is_dir():
            shutil.copytree(root / part, where / part, copy_function=copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy(str(root / part), str(where / part))
    return where


class First:
    """pytest plugin: the first thing that failed."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.split("::", 1)[-1]

    pytest_collectreport = pytest_runtest_logreport


def child(where: Path, arguments: list[str], answer: Connection) -> None:
    """pytest on the copy, in a process forked from one that holds the libraries but nothing of ours."""
    os.chdir(where)
    os.environ |= {
        "PYTHONPATH": f"{where / 'src'}{os.pathsep}{where}",
        "PYTHONDONTWRITEBYTECODE": "1",
        # an editable install answers for trimtab before PYTHONPATH does, except inside its own builds
        "SKBUILD_EDITABLE_SKIP": os.pathsep.join(str(path) for path in (ROOT / "build").glob("cp*")),
    }
    sys.dont_write_bytecode = True
    with open(where / "output", "w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        import pytest

        first = First()
        options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = int(pytest.main([*options, *arguments], plugins=[first]))
    ours = sys.modules.get("trimtab")
    if ours is not None and not Path(ours.__file__).is_relative_to(where):
        code, first.name = 3, f"the tests imported {ours.__file__}, not the copy"
    answer.send((code, first.name))


def run(where: Path, arguments: list[str]) -> tuple[int, str]:
    """pytest's exit code (1 for a timeout or a crash) and the first failure."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=child, args=(where, arguments, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT):
            return 1, "the tests hang"
        return ours.recv()
    except EOFError:
        return 1, "the tests crash"
    finally:
        process.join(10)  # it has answered and is about to end
        process.kill()
        process.join()


def baseline(bugs: list[Bug], clean: Path) -> str:
    """Why the hunt would prove nothing; empty if all is well."""
    wanted: dict[tuple[str, ...], set[str]] = {}  # files -> what -k chooses of them
    for b in bugs:
        source = (clean / b.path).read_text(encoding="utf-8")
        if source.count(b.old) != 1:
            return f"{b.path}: {b.old!r} is there {source.count(b.old)} times, not once ({b.why})"
        files, _, chosen = " ".join(b.arguments(source)).partition(" -k ")
        wanted.setdefault(tuple(files.split()), set()).add(f"({chosen})" if chosen else "")
    for files, chosen in wanted.items():
        choice = [] if "" in chosen else ["-k", " or ".join(sorted(chosen))]
        code, first = run(clean, [*files, *choice])
        if code:
            return f"pytest {' '.join(files)} gives {code} before any bug: {first}"
    return ""


def hunt(bug: Bug, clean: Path) -> tuple[Bug, int, str, float]:
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="mutate-") as tmp:
        where = copied(clean, Path(tmp).resolve() / "copy")
        source = (where / bug.path).read_text(encoding="utf-8")
        (where / bug.path).write_text(source.replace(bug.old, bug.new), encoding="utf-8")
        code, first = run(where, bug.arguments(source))
    return bug, code, first, time.time() - began


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--only", default="", help="bugs whose file or reason contains this")
    ask.add_argument("--jobs", type=int, default=1)
    args = ask.parse_args()
    bugs = [b for b in BUGS if args.only in b.file or args.only in b.why]
    if not bugs:
        print(f"no bug matches {args.only!r}")
        return 2
    FORKS.set_forkserver_preload(["torch", "numpy", "pytest", "scipy.optimize", "transformers"])
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that has started threads is not one to fork
    alive = 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as tmp, ThreadPoolExecutor(args.jobs) as pool:
        clean = copied(ROOT, Path(tmp).resolve() / "clean")  # as it is now: the tree may go on changing
        if why := baseline(bugs, clean):
            print(why)
            return 2
        for bug, code, first, seconds in pool.map(hunt, bugs, [clean] * len(bugs)):
            if code not in (0, 1, 2):  # 2: the tests could not even be collected; 3 and up: pytest itself
                print(f"pytest gave {code} for {bug.why}: {first}")
                return 2
            alive += code == 0
            print(f"{'SURVIVED' if code == 0 else 'killed  '} {seconds:5.1f} s  {bug.file}: {bug.why}"
                  f"{'' if code == 0 else f'  [{first}]'}", flush=True)
    print(f"{len(bugs) - alive} of {len(bugs)} killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
