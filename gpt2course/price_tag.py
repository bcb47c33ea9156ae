"""The price tag of each retrofit on a trained model: perplexity before, right after surgery and healed; cache; speed.

Legend: B batch, T positions, G key/value heads, D head width.
"""

import copy
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gpt2course.bench.decoding import filled
from gpt2course.bench.timing import ratio, synchronize
from gpt2course.chapters.run import machine
from gpt2course.config import GPTConfig
from gpt2course.data import Batches, Prepared, documents, prepare
from gpt2course.data.encode import encode
from gpt2course.data.prepare import split_of
from gpt2course.evaluate import evaluate_loss, evaluating
from gpt2course.healing import heal
from gpt2course.model import GPT
from gpt2course.pretrained import open_model
from gpt2course.prices import FILE, Prices, Row, Settings, Speed, load
from gpt2course.surgery import METHODS, KVCost, Surgery, to_gqa, to_rope, to_window

Operation = Callable[[GPT], tuple[GPT, Surgery]]
UNCHANGED = "unchanged"
SINKS = 4
# Not prose and not programs: one file of documentation, two thirds of the held-out tokens, and tables of characters.
NOT_MODULES = ("pydoc_data/", "encodings/")
BLOCKS = {1: 36, 16: 12}  # by how many sequences are decoded at once: the shorter a block, the more of them
BLOCK_TOKENS = 16


def retrofits(config: GPTConfig) -> dict[str, tuple[Operation, ...]]:
    """What to do to a model of this shape, by name; first nothing, for the control that is trained on by as much."""
    window, narrow = max(1, config.block_size // 4), max(1, config.block_size // 8)
    found: dict[str, tuple[Operation, ...]] = {UNCHANGED: ()}
    groups = some_kv_heads(config.kv_heads)
    fewer = {groups: f"GQA-{groups}", 1: "MQA"}
    for n_kv_head, name in fewer.items():
        if n_kv_head < config.kv_heads:
            for method in METHODS:
                found[f"{name}, {method}"] = (partial(to_gqa, n_kv_head=n_kv_head, method=method),)
    found[f"window {window}"] = (partial(to_window, window=window),)
    found[f"window {window} + {SINKS} sinks"] = (partial(to_window, window=window, sinks=SINKS),)
    found[f"window {narrow}, SSL"] = (partial(to_window, window=narrow, pattern="SSL"),)
    if long := config.n_layer // 3:  # as many long layers as SSL has, at the bottom
        pattern = "L" * long + "S" * (config.n_layer - long)
        found[f"window {narrow}, {long} long first"] = (partial(to_window, window=narrow, pattern=pattern),)
    if config.pos == "learned":
        found["RoPE"] = (to_rope,)
        every = (to_rope, partial(to_gqa, n_kv_head=groups), partial(to_window, window=window))
        found[f"RoPE + {fewer[groups]} + window {window}"] = every
    return found


def some_kv_heads(n: int) -> int:
    """A number of key/value heads between all and one: a third of them if that is whole, else the largest divisor."""
    return n // 3 if n % 3 == 0 else max((d for d in range(1, n) if n % d == 0), default=1)


def operated(model: GPT, operations: tuple[Operation, ...]) -> tuple[GPT, str]:
    """A new model after all operations, and what was done."""
    if not operations:
        return copy.deepcopy(model), "nothing"
    done = []
    for operation in operations:
        model, report = operation(model)
        done.append(report.done)
    return model, "; ".join(done)


def held_out_text(corpus: str, prepared: Prepared, n: int) -> tuple[np.ndarray, str]:
    """n + 1 held-out tokens (fewer if there are no more), and what they are.

    Of the standard library only ordinary modules: the held-out part is two thirds one file of documentation, which
    would drown what happens to programs.
    """
    if corpus == "stdlib":
        held_out = (d for d in documents(corpus) if split_of(d.name, prepared.val_fraction) == "val")
        modules = [d for d in held_out if not d.name.startswith(NOT_MODULES)]
        ids = np.concatenate([encode(("val", d))[2] for d in modules])[: n + 1]
        return ids, f"the first {len(ids) - 1:,} tokens of the held-out ordinary modules of the standard library"
    stream = prepared.stream("val")
    ids = stream.read(0, min(n + 1, len(stream)))
    return ids, f"the first {len(ids) - 1:,} held-out tokens of {corpus}"


def weights_sha256(model: GPT) -> str:
    """A hash that tells two models apart."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


class Counted:
    """Batches that move a progress bar on."""

    def __init__(self, batches: Batches, bar: tqdm) -> None:
        self.batches, self.bar = batches, bar

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.bar.update()
        return self.batches.batch(step)


def campaign(settings: Settings, out: Path, resume: bool = False, progress: bool = True) -> Prices:
    """Make every row, each saved as soon as it is done, and the figure.

    Args:
        settings: what to measure on.
        out: folder of `price_tag.json` and `price_tag.png`.
        resume: keep the rows that are there, if they were made with the same settings, model and text.
        progress: show a bar.

    Raises:
        ValueError: for settings out of range, results that are there already without `resume`, or differ in what they
            were made with.
    """
    settings.check()
    if (out / FILE).exists() and not resume:
        raise ValueError(f"{out / FILE} is there already; go on with it by --resume, or choose another --out")
    model, sentence = open_model(settings.model, settings.device)
    prepared = prepare(settings.corpus, progress=progress)
    ids, text = held_out_text(settings.corpus, prepared, settings.tokens)
    train = prepared.stream("train")
    batches = Batches(train, settings.batch_size, model.config.block_size, settings.seed)
    used = None if settings.full_vocabulary else torch.from_numpy(np.unique(train.read(0, len(train))).astype(np.int64))
    shown = replace(settings, model=without_folders(settings.model), corpus=without_folders(settings.corpus))
    made = Prices(
        command=shown.command,
        model=sentence.replace(settings.model, shown.model),
        torch=torch.__version__,
        settings=shown,
        weights=weights_sha256(model),
        corpus_fingerprint=prepared.fingerprint,
        held_out=text.replace(settings.corpus, shown.corpus),
        perplexity=0.0,
        block_size=model.config.block_size,
    )
    if (out / FILE).exists():
        made = going_on(load(out / FILE), made)
    else:
        made = replace(made, perplexity=evaluate_loss(model, ids).perplexity)
    every = retrofits(model.config)
    todo = {name: how for name, how in every.items() if name not in {row.name for row in made.rows}}
    autocast = torch.bfloat16 if settings.precision == "bfloat16" else None
    try:
        with tqdm(total=len(todo) * settings.steps, unit="step", disable=not progress) as bar:
            for name, operations in todo.items():
                bar.set_description(name)
                changed, done = operated(model, operations)
                after = evaluate_loss(changed, ids)
                healing = heal(
                    changed,
                    Counted(batches, bar),
                    settings.steps,
                    learning_rate=settings.learning_rate,
                    autocast=autocast,
                    vocabulary=used,
                    seed=settings.seed,
                )
                if healing.interrupted:
                    raise KeyboardInterrupt
                cost = KVCost.of(changed.config, changed.wte.weight.element_size())
                row = Row(
                    name=name,
                    done=done,
                    parameters=changed.num_params(),
                    kv_per_token=cost.per_token,
                    kv_fixed=cost.fixed,
                    perplexity_after=after.perplexity,
                    perplexity_healed=evaluate_loss(changed, ids).perplexity,
                    training_losses=tuple(round(loss, 4) for loss in healing.losses),
                    seconds_a_step=round(healing.seconds / settings.steps, 3),
                    machine=machine(),
                    speeds=speeds(model, changed),
                )
                made = made.with_row(row).in_order(list(every))
                made.save(out)
    except KeyboardInterrupt:
        print(f"\n{len(made.rows)} rows are kept in {out / FILE}; go on with --resume", file=sys.stderr)
        raise
    draw(made, out)
    return made


def without_folders(name: str) -> str:
    """The last part of a path, so that a record does not tell where files lie; any other name as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def going_on(found: Prices, wanted: Prices) -> Prices:
    """The prices found, to be gone on with. Raises ValueError if they were made with something else."""
    old, new = vars(found.settings), vars(wanted.settings)
    differ = [f"{name} {old[name]}, not {new[name]}" for name in old if old[name] != new[name]]
    differ += ["another model's weights"] * (found.weights != wanted.weights)
    differ += ["another text"] * (found.corpus_fingerprint != wanted.corpus_fingerprint)
    if differ:
        raise ValueError(f"the rows there were made with {'; '.join(differ)}; choose another --out, or the same flags")
    return found


def remeasure(checkpoint: str, out: Path, device: str = "cpu", progress: bool = True) -> Prices:
    """Measure the speeds of an existing file's rows again, and nothing else. Nothing is trained: speed needs shapes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it was made with another model.
    """
    made = load(out / FILE)
    model, sentence = open_model(checkpoint, device)
    if weights_sha256(model) != made.weights:
        raise ValueError(f"{out / FILE} was made with another model, not with: {sentence}")
    how = retrofits(model.config)
    if gone := [row.name for row in made.rows if row.name not in how]:
        raise ValueError(f"{out / FILE} has rows that are no longer made: {', '.join(gone)}; make the table again")
    for row in tqdm(made.rows, unit="row", disable=not progress):
        made = made.with_row(replace(row, speeds=speeds(model, operated(model, how[row.name])[0])))
        made.save(out)
    draw(made, out)
    return made


def draw(made: Prices, out: Path) -> None:
    """The figure beside the JSON."""
    from gpt2course.viz.price_tag import price_tag_figure

    price_tag_figure(made).savefig(out / Path(FILE).with_suffix(".png"), metadata={"Software": None})


def speeds(unchanged: GPT, changed: GPT) -> tuple[Speed, ...]:
    """Decoding speed for one sequence and for several at once."""
    return tuple(decode_speed(unchanged, changed, batch_size, blocks) for batch_size, blocks in BLOCKS.items())


@torch.inference_mode()
def decode_speed(unchanged: GPT, changed: GPT, batch_size: int, blocks: int) -> Speed:
    """How fast the changed model decodes near the end of its context, beside the unchanged one.

    The two take turns, block by block, and each block gives one ratio: what else the machine does slows both. The
    caches hold random keys and values, since the time does not depend on their worth.
    """
    seconds: dict[str, list[float]] = {"old": [], "new": []}
    pair = [("old", unchanged), ("new", changed)]
    with evaluating(unchanged), evaluating(changed):
        for block in range(-1, blocks):  # the first, which warms up, does not count
            for name, model in pair if block % 2 else reversed(pair):
                took = block_seconds(model, batch_size)
                if block >= 0:
                    seconds[name].append(took)
    faster = ratio(seconds["old"], seconds["new"])
    tokens = batch_size * block_tokens(changed.config)
    return Speed(
        batch_size=batch_size,
        tokens_per_second=tokens / statistics.median(seconds["new"]),
        unchanged_tokens_per_second=tokens / statistics.median(seconds["old"]),
        ratio=faster.median,
        ratio_low=faster.low,
        ratio_high=faster.high,
        blocks=blocks,
        threads=torch.get_num_threads(),
        machine=machine(),
    )


def block_tokens(config: GPTConfig) -> int:
    """Tokens decoded in a row for one measurement."""
    return min(BLOCK_TOKENS, config.block_size // 2)


def block_seconds(model: GPT, batch_size: int) -> float:
    """Seconds to decode one block of tokens greedily, the last that the context has room for."""
    device, n = model.wte.weight.device, block_tokens(model.config)
    cache = filled(model.config, model.config.block_size, n + 1, device, model.wte.weight.dtype, batch_size)
    ids_B1 = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    started = 0.0
    for step in range(n + 1):
        if step == 1:  # the one before warmed up
            synchronize(device)
            started = time.perf_counter()
        ids_B1 = model.lm_head(model.hidden(ids_B1, cache=cache)[:, -1]).argmax(-1, keepdim=True)
    synchronize(device)
    return time.perf_counter() - started
