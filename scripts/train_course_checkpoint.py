"""Train the small GPT-2 that the course ships in gpt2course/assets/course, on the Python standard library's source.

    python scripts/train_course_checkpoint.py --out runs/course

One process, one thread, bfloat16 products, a plain loop that reads top to bottom. The corpus uses only about a third of
GPT-2's 50,257 tokens, so most steps compare the target with those alone, which makes a step about three times cheaper;
the last steps use the full vocabulary. Every loss that is logged as held-out is over the full vocabulary.

A run that was stopped goes on with `--resume` from the last weights it saved. They are saved in float16, and Adam's
averages, which remember some twenty steps, start anew.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpt2course import GPT, GPTConfig
from gpt2course.data import Batches, TokenStream, prepare
from gpt2course.evaluate import evaluate_loss
from gpt2course.loss import chunked_cross_entropy
from gpt2course.pretrained import load_checkpoint, save_pretrained
from gpt2course.train.optim import learning_rate_at, make_optimizer

CONFIG = GPTConfig(n_layer=6, n_head=4, n_embd=128, block_size=512)
WARMUP = 200


def count_tokens(stream: TokenStream) -> Tensor:
    """How often each of the 50,257 ids occurs."""
    counts = np.bincount(stream.read(0, len(stream)), minlength=CONFIG.vocab_size)
    return torch.from_numpy(counts.astype(np.int64))


@torch.no_grad()
def place_unseen(model: GPT, counts_V: Tensor) -> None:
    """Move the tokens that never occur to where the rarest ones have learned to be: unlikely everywhere."""
    rare_C = model.wte.weight[(counts_V > 0) & (counts_V <= 2)].mean(0)
    model.wte.weight[counts_V == 0] += rare_C


def last_saved(out: Path) -> list[dict[str, Any]]:
    """The rows of the log up to the last one whose weights were saved. Raises FileNotFoundError if there is no log."""
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    saved = max((i for i, row in enumerate(rows) if "val_loss" in row), default=-1)
    return rows[: saved + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/course"), help="folder for checkpoint and log")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--full-vocabulary-steps", type=int, default=250, help="how many of them, at the end")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of block_size tokens a step")
    parser.add_argument("--learning-rate", type=float, default=2.5e-3)
    parser.add_argument("--eval-every", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the last weights saved in --out")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    corpus = prepare("stdlib")
    train, val = corpus.stream("train"), corpus.stream("val")
    batches = Batches(train, args.batch_size, CONFIG.block_size, args.seed)
    counts_V = count_tokens(train)
    used = counts_V.nonzero().squeeze(1)
    place = torch.full((CONFIG.vocab_size,), -100)
    place[used] = torch.arange(len(used))
    rows = last_saved(args.out) if args.resume else []
    model = load_checkpoint(args.out).train() if rows else GPT(CONFIG)
    optimizer = make_optimizer(model.parameters())
    args.out.mkdir(parents=True, exist_ok=True)
    first, earlier = (rows[-1]["step"], rows[-1]["seconds"]) if rows else (0, 0.0)
    full_from = args.steps - args.full_vocabulary_steps
    started = time.perf_counter() - earlier

    def held_out(max_tokens: int | None) -> float:
        return evaluate_loss(model, val.read(0, len(val)), max_tokens=max_tokens).loss

    with (args.out / "train_log.jsonl").open("w") as log, tqdm(total=args.steps, initial=first, unit="step") as bar:
        log.writelines(json.dumps(row) + "\n" for row in rows)
        for step in range(first, args.steps):
            if step == full_from:
                place_unseen(model, counts_V)
            rate = learning_rate_at(
                step, steps=args.steps, peak=args.learning_rate, schedule="linear", warmup_steps=WARMUP
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            x_BT, y_BT = batches.batch(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                if step < full_from:
                    h_NC = model.hidden(x_BT).flatten(0, 1)
                    loss = chunked_cross_entropy(h_NC, model.wte.weight[used], place[y_BT].flatten()) / y_BT.numel()
                else:
                    loss = model(x_BT, y_BT)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"loss is {loss.item()} at step {step}")
            row = {"step": step + 1, "tokens": (step + 1) * y_BT.numel(), "loss": round(loss.item(), 4)}
            row |= {"grad_norm": round(norm.item(), 4), "seconds": round(time.perf_counter() - started, 1)}
            if (step + 1) % args.eval_every == 0:
                row["val_loss"] = round(held_out(max_tokens=32_768), 4)
                save_pretrained(model, args.out, dtype=torch.float16)
            if step % 10 == 9 or "val_loss" in row:
                log.write(json.dumps(row) + "\n")
                log.flush()
            bar.update()
            bar.set_postfix(loss=row["loss"])
    summary = {
        "val_loss": held_out(max_tokens=None),
        "val_tokens": len(val) - 1,
        "train_tokens": args.steps * args.batch_size * CONFIG.block_size,
        "corpus_fingerprint": corpus.fingerprint,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "torch": torch.__version__,
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("out", "resume")},
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
