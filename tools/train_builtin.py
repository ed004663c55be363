"""Train `builtin:lm`, or with `--activation relu` its sibling `builtin:lm-relu`, on the interpreter's own standard
library. Stop it any time; run it again to go on.

    python tools/train_builtin.py --work build/builtin-lm --tokens 9e6
    python tools/train_builtin.py --work build/more --start src/trimtab/builtin/lm --functions 0.375 --tokens 6e6
    python tools/train_builtin.py --work build/more --publish src/trimtab/builtin/lm

Recipe: matrices by Muon (momentum, orthogonalised by Newton-Schulz), the tied embedding and the norms by
AdamW; constant learning rate for the first half, then linear to zero; windows of 512 tokens in the first
half and 1,024 in the second. `--start` trains a published model on; `--functions` gives that share of every
batch to functions on their own, without docstring, so that a header alone is no stranger. Products in
bfloat16 where the processor has them. Batches are a pure function of the token count, so a resumed run sees
the data an uninterrupted one would have seen. Every checkpoint replaces the last one atomically.
"""
from __future__ import annotations

import argparse
import ast
import json
import math
import os
import shutil
import textwrap
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimtab.builtin import corpus

VOCAB, EOT = 4096, "<|endoftext|>"
# A word takes one leading mark with it (`.append`, `_name`, ` self`); a newline takes its whole indentation.
PIECES = r"[^\r\n\w]?\w+| ?[^\s\w]+|\s*\n\s*|\s+(?!\S)|\s+"
STEP_TOKENS, WARMUP, SHORT, LONG = 8192, 60, 512, 1024
DOCS = Path(__file__).resolve().parents[1] / "docs"
# By the function between the two halves of an MLP.
CURVES = {"silu": DOCS / "builtin-curve.jsonl", "relu": DOCS / "builtin-relu-curve.jsonl"}
LR_MATRIX, LR_REST, DECAY = 0.02, 0.004, 0.01


def shape(activation: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LONG, rope_theta=10000.0,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0, attn_implementation="sdpa", hidden_act=activation,
    )


def make_tokenizer(path: Path) -> Tokenizer:
    if not path.exists():
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
        tok.decoder = decoders.ByteLevel()
        tok.train_from_iterator(corpus.text("train"), trainers.BpeTrainer(
            vocab_size=VOCAB, special_tokens=[EOT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        tok.save(str(path))
    return Tokenizer.from_file(str(path))


def stream(tok: Tokenizer, split: str) -> torch.Tensor:
    """All modules of a split as one row of ids, an end-of-text before each."""
    return joined(tok, corpus.text(split))


def joined(tok: Tokenizer, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for enc in tok.encode_batch(texts, add_special_tokens=False):
        ids += [0, *enc.ids]
    return torch.tensor(ids, dtype=torch.long)


def functions(texts: list[str]) -> list[str]:
    """Every function and method of at most 60 lines as a text of its own: not indented, no decorators, no docstring."""
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        lines = text.splitlines()
        for n in ast.walk(tree):
            if not isinstance(n, ast.FunctionDef) or n.end_lineno is None or n.end_lineno - n.lineno > 60:
                continue
            kept, first = lines[n.lineno - 1:n.end_lineno], n.body[0]
            if ast.get_docstring(n, clean=False) is not None and first.end_lineno is not None:
                if len(n.body) == 1 or first.lineno == n.lineno:
                    continue
                kept = lines[n.lineno - 1:first.lineno - 1] + lines[first.end_lineno:n.end_lineno]
            found.append(textwrap.dedent("\n".join(kept)) + "\n")
    return found


def batch(data: torch.Tensor, first: int, count: int, length: int) -> torch.Tensor:
    """Windows `first` to `first + count`: a shuffled grid, shifted and reshuffled each epoch."""
    per_epoch = (len(data) - length - 1) // length
    rows = []
    for i in range(first, first + count):
        epoch, k = divmod(i, per_epoch)
        g = torch.Generator().manual_seed(1000 * epoch + length)
        shift = int(torch.randint(0, length, (1,), generator=g))
        at = min(int(torch.randperm(per_epoch, generator=g)[k]) * length + shift, len(data) - length - 1)
        rows.append(data[at:at + length + 1])
    return torch.stack(rows)


class Muon:
    """Momentum, then the nearest (semi-)orthogonal matrix by five quintic Newton-Schulz steps (Jordan et al. 2024)."""

    def __init__(self, params: list[torch.Tensor], dtype: torch.dtype = torch.float32):
        self.params, self.buf, self.dtype = params, [torch.zeros_like(p) for p in params], dtype
        self.groups: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(params):
            self.groups.setdefault(tuple(p.shape), []).append(i)

    @torch.no_grad()
    def step(self, lr: float, momentum: float = 0.95) -> None:
        for (rows, cols), idx in self.groups.items():
            moved = []
            for i in idx:
                grad = self.params[i].grad
                assert grad is not None
                self.buf[i].mul_(momentum).add_(grad)
                moved.append(grad + momentum * self.buf[i])
            x = torch.stack(moved).to(self.dtype)
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            if tall := rows > cols:
                x = x.mT
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            if tall:
                x = x.mT
            scale = lr * math.sqrt(max(1.0, rows / cols))
            for i, u in zip(idx, x, strict=True):
                self.params[i].mul_(1 - lr * DECAY).sub_(u, alpha=scale)


def learning_rate(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / WARMUP) * min(1.0, 2 * (1 - progress))


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tok: Tokenizer, texts: list[str], window: int = LONG, stride: int = 512,
                  limit: int | None = None) -> float:
    """Each module on its own, every token scored once with at least window - stride tokens before it (if there are)."""
    nats, size = 0.0, 0
    for t in texts[:limit]:
        ids = torch.tensor([0, *tok.encode(t, add_special_tokens=False).ids])
        size += len(t.encode())
        done = 1
        while done < len(ids):
            end = min(len(ids), max(done + stride, window))
            begin = max(0, end - window)
            logits = model(input_ids=ids[begin:end][None], use_cache=False).logits[0]
            logp = torch.log_softmax(logits[done - begin - 1:-1].float(), -1)
            nats -= logp.gather(1, ids[done:end, None]).double().sum().item()
            done = end
    return nats / math.log(2) / size


def save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(work: Path, total: int, threads: int, compiled: bool, start: Path | None, share: float, activation: str) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    if start and not (work / "tokenizer.json").exists():
        shutil.copy(CURVES[activation], work / "curve.jsonl")
        shutil.copy(start / "tokenizer.json", work / "tokenizer.json")
    tok = make_tokenizer(work / "tokenizer.json")
    data = stream(tok, "train")
    alone = joined(tok, functions(corpus.text("train"))) if share else data
    peek = [t for t in corpus.text("validation") if len(t) < 30000][::4]
    model = LlamaForCausalLM(shape(activation))
    before = 0  # tokens the model to start from had seen
    if start:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict())
        before = json.loads(CURVES[activation].read_text().splitlines()[-1])["tokens"]
    bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon, adam = Muon(matrices, torch.bfloat16 if bf16 else torch.float32), torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    done = step = 0
    seconds = 0.0
    ckpt = work / "checkpoint.pt"
    if ckpt.exists():
        s = torch.load(ckpt, weights_only=True)
        model.load_state_dict(s["model"])
        adam.load_state_dict(s["adam"])
        for b, v in zip(muon.buf, s["muon"], strict=True):
            b.copy_(v)
        done, step, seconds = s["done"], s["step"], s["seconds"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} + {len(alone) if share else 0:,} training tokens, "
          f"at {done:,}, {'bfloat16' if bf16 else 'float32'} products", flush=True)
    run = torch.compile(model) if compiled else model
    log, mark, recent = (work / "curve.jsonl").open("a"), time.time(), []
    while done < total:
        progress = done / total
        length = SHORT if progress < 0.5 else LONG
        rate = learning_rate(step, progress)
        count = STEP_TOKENS // length
        n_alone = round(count * share)
        x = batch(data, done // length * (count - n_alone) // count, count - n_alone, length)
        if n_alone:
            x = torch.cat([x, batch(alone, step * n_alone, n_alone, length)])
        loss_sum, micro = 0.0, 4096 // length
        for part in x.split(micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = run(input_ids=part[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, VOCAB), part[:, 1:].reshape(-1))
            (loss * len(part) / len(x)).backward()
            loss_sum += loss.item() * len(part) / len(x)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for group in adam.param_groups:
            group["lr"] = LR_REST * rate
        muon.step(LR_MATRIX * rate)
        adam.step()
        model.zero_grad()
        done, step = done + STEP_TOKENS, step + 1
        recent.append(loss_sum)
        if step % 25 == 0 or done >= total:
            seconds, mark = seconds + time.time() - mark, time.time()
            row = {"step": step, "tokens": before + done, "loss": round(sum(recent) / len(recent), 4), "seconds": round(seconds)}
            if step % 100 == 0 or done >= total:
                row["peek_bits_per_byte"] = round(bits_per_byte(model, tok, peek), 4)
            recent = []
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, flush=True)
        if step % 50 == 0 or done >= total:
            save(ckpt, {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.buf,
                        "done": done, "step": step, "seconds": seconds})


def publish(work: Path, out: Path, activation: str) -> None:
    """Write the checkpoint as an ordinary bf16 model directory, measured on the whole validation split."""
    tok = Tokenizer.from_file(str(work / "tokenizer.json"))
    s = torch.load(work / "checkpoint.pt", weights_only=True)
    model = LlamaForCausalLM(shape(activation))
    model.load_state_dict(s["model"])
    model = model.to(torch.bfloat16)
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    # A prompt begins a module, as every module began in training: without the mark its indentation would be unknown.
    tok.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", pair=f"{EOT} $A {EOT} $B", special_tokens=[(EOT, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=EOT, eos_token=EOT, pad_token=EOT, model_max_length=LONG)
    fast.save_pretrained(staging)
    shutil.copy(work / "curve.jsonl", CURVES[activation])
    bpb = bits_per_byte(model.float().eval(), tok, corpus.text("validation"))
    print(f"validation: {bpb:.4f} bits per byte, window {LONG}, stride 512, {s['done']:,} tokens in {s['seconds'] / 60:.0f} minutes")
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging, out)


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description="Train or publish builtin:lm.")
    ap.add_argument("--work", type=Path, required=True, help="folder of checkpoint, tokenizer and curve")
    ap.add_argument("--tokens", type=float, default=9e6, help="tokens to train on, fixed before half of them are done")
    ap.add_argument("--start", type=Path, metavar="DIR", help="train this published model on, instead of a fresh one")
    ap.add_argument("--functions", type=float, default=0.0, metavar="SHARE", help="share of functions on their own")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--no-compile", action="store_true")
    ap.add_argument("--activation", choices=CURVES, default="silu", help="between the two halves of an MLP")
    ap.add_argument("--publish", type=Path, metavar="DIR", help="write the model there instead of training")
    a = ap.parse_args()
    if a.publish:
        publish(a.work, a.publish, a.activation)
    else:
        train(a.work, int(a.tokens), a.threads, not a.no_compile, a.start, a.functions, a.activation)
