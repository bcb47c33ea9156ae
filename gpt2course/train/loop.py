"""The one training loop: single device, DDP and FSDP differ in the `Strategy` it is given, and in nothing else.

Whatever a step depends on besides the weights is a pure function of its number: the batch, the learning rate, and the
seed of dropout (of the rank, too). So a checkpoint has no generators and no position in the data to keep, and a run
that goes on from one can't replay or skip a batch.
"""

import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from gpt2course.train.checkpoint import Checkpoints
from gpt2course.train.comm import Traffic, Waiting
from gpt2course.train.config import TrainConfig
from gpt2course.train.data import RunData
from gpt2course.train.heldout import held_out_loss
from gpt2course.train.metrics import MetricsLog, PhaseClock, mfu, peak_bytes, tensor_memory
from gpt2course.train.optim import learning_rate_at, make_optimizer
from gpt2course.train.parallel import Strategy
from gpt2course.train.step import (
    DivergedError,
    LossScale,
    apply_gradients,
    compute_gradients,
    finite,
    global_norm,
    unscale,
)
from gpt2course.train.stop import StopSignals
from gpt2course.train.world import own_generators

SAME_ON_RESUME = ("data", "seed", "batch_size")


@dataclass(frozen=True)
class Result:
    """How a run, or the part of it since its last start, went."""

    first_step: int
    """steps that were done before this start"""
    rows: list[dict[str, Any]] = field(repr=False)
    """one a step, as in the log"""
    val_loss: float | None
    """nats per token at the end"""
    skipped: int
    """steps not taken because loss or gradient were not finite, since the run's beginning"""
    stopped: str
    """name of the signal that ended the run early, whichever process it came to, or empty"""
    checkpoint: Path | None
    """where the run can go on from"""

    @property
    def losses(self) -> list[float]:
        """Training loss of each step since this start, before its update."""
        return [row["loss"] for row in self.rows]


def train(
    config: TrainConfig,
    strategy: Strategy,
    data: RunData,
    *,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    progress: bool | None = None,
) -> Result:
    """Train until `config.steps` are done, or a signal asks to stop.

    Every process calls it. After SIGTERM or Ctrl-C the processes agree at the end of the step, save, and return.

    Args:
        config: the run.
        strategy: from `single`, `ddp` or `fsdp`.
        data: what to train on; held-out losses need its `val`.
        on_step: called on rank 0 with each row of the log.
        progress: show a bar on rank 0; by default where the output is a terminal.

    Raises:
        DivergedError: after `max_bad_steps` steps in a row whose loss or gradient are not finite, with a checkpoint of
            the last good weights.
        ValueError: for a checkpoint that does not fit this run, or can't be read or written (`CheckpointError`).
    """
    with StopSignals() as stop, own_generators(strategy.world.device):
        return Training(config, strategy, data, stop).run(on_step, progress)


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random on one process in one step."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


class Training:
    """The state of a run between two steps, and what is done with it."""

    def __init__(self, config: TrainConfig, strategy: Strategy, data: RunData, stop: StopSignals) -> None:
        self.config, self.strategy, self.data, self.stop = config, strategy, data, stop
        self.world = strategy.world
        self.parameters = [p for p in strategy.module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(
            self.parameters, config.learning_rate, config.weight_decay, (config.beta1, config.beta2)
        )
        self.scale = LossScale.for_precision(config.precision)
        self.waiting = Waiting(self.world, strategy.sums)
        self.clock = PhaseClock(self.world.device, self.waiting)
        self.checkpoints = Checkpoints(config.out / "checkpoints", self.world, config.keep_last, config.async_save)
        self.step = self.tokens = self.skipped = self.bad_in_row = 0
        self.val_loss: float | None = None
        self.stop_agreed = ""
        self.sent: dict[str, int] = {}
        self.memory: dict[str, int] = {}
        self.restore()
        self.first_step = self.step
        if self.world.first:
            config.out.mkdir(parents=True, exist_ok=True)
            (config.out / "config.json").write_text(f"{config}\n")
        self.log = MetricsLog(
            config.metrics_path,
            self.world,
            self.step or None,
            config.out / "tensorboard" if config.tensorboard else None,
        )

    def restore(self) -> None:
        """Go on from the checkpoint that the config asks for, if there is one."""
        config = self.config
        path = self.checkpoints.newest()
        if path is None and config.resume not in ("auto", "never"):
            path = Path(config.resume)
        if path is None:
            return
        # Restarted by torchrun, the run is this one. Each machine counts by itself, and only where a process failed.
        restarted = any(self.world.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))
        if config.resume == "never" and not restarted:
            raise ValueError(f"{config.out} holds a run, saved at {path.name}; choose another --out, or --resume auto")
        meta = self.checkpoints.load(path, self.strategy.module, self.optimizer)
        begun_at = meta["config"]["resume"]
        if config.resume not in ("auto", "never", begun_at) and path != Path(config.resume):
            raise ValueError(
                f"{config.out} holds a run, saved at {path.name}, which did not begin at {config.resume}; "
                "choose another --out, or --resume auto"
            )
        ours = self.meta()
        if other := [name for name in SAME_ON_RESUME if meta[name] != ours[name]]:
            told = "".join(f"\n  - {name}: {meta[name]} in the checkpoint, {ours[name]} now" for name in other)
            raise ValueError(
                f"{path} is of a run on other batches:{told}\ngo on with the same, or start in another --out"
            )
        self.step, self.tokens = meta["step"], meta["tokens"]
        self.skipped, self.bad_in_row = meta["skipped"], meta["bad_in_row"]
        self.val_loss = meta["val_loss"]
        saved = LossScale(**meta["loss_scale"])
        if saved.moves == self.scale.moves:  # else the precision has changed, and the scale begins as its own
            self.scale = saved

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says besides its tensors."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "bad_in_row": self.bad_in_row,
            "loss_scale": asdict(self.scale),
            "model": self.config.model.to_dict(),
            "data": self.data.fingerprint,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "world_size": self.world.world_size,
            "strategy": self.strategy.name,
            "config": self.config.to_dict(),
            "torch": torch.__version__,
        }

    def run(self, on_step: Callable[[dict[str, Any]], None] | None, progress: bool | None) -> Result:
        """All steps that are left."""
        config, rows = self.config, []
        shown = sys.stderr.isatty() if progress is None else progress
        N = self.world.world_size
        who = f"{self.strategy.name}, {N} process{'es' if N > 1 else ''} on {self.world.device.type}"
        self.say(f"{who}; {self.step} of {config.steps} steps done in {config.out}")
        with (
            tqdm(total=config.steps, initial=self.step, unit="step", disable=not (shown and self.world.first)) as bar,
            self.log,
            self.waiting,
        ):
            while self.step < config.steps and not self.stop_agreed:
                row = self.take_step()
                last = self.step == config.steps
                if last or (config.eval_every and self.step % config.eval_every == 0):
                    row["val_loss"] = self.evaluate()
                self.log.write(row)
                rows.append(row)
                bar.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                bar.update()
                if on_step is not None and self.world.first:
                    on_step(row)
                if self.bad_in_row >= config.max_bad_steps:
                    self.diverged()
                if last or self.stop_agreed or (config.save_every and self.step % config.save_every == 0):
                    self.save(row.get("val_loss"))
        self.checkpoints.wait()
        return Result(
            self.first_step,
            rows,
            self.val_loss,
            self.skipped,
            self.stop_agreed if self.step < config.steps else "",
            self.checkpoints.newest(),
        )

    def take_step(self) -> dict[str, Any]:
        """One optimizer step; its row of the log."""
        config, world, clock = self.config, self.world, self.clock
        traffic = None if self.sent else Traffic()  # the same in every step; counting slows every operation
        clock.start()
        started = time.perf_counter()
        torch.manual_seed(step_seed(config.seed, self.step, world.rank))
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x_BT, y_BT = self.data.train.batch(self.step, world.rank, world.world_size)
        clock.mark("data")
        with traffic or nullcontext():
            share, n_valid = compute_gradients(
                self.strategy, x_BT, y_BT, config.grad_accum_steps, self.scale.factor, clock
            )
            unscale(self.parameters, self.scale.factor)
            norm = global_norm(self.parameters)
        # One small sum decides for all: a process that skipped, stopped or saved alone would lose the others.
        loss, bad, term, interrupt, ready = world.sum(
            share,
            not finite(share, norm),
            self.stop.wanted == "SIGTERM",
            self.stop.wanted == "SIGINT",
            self.checkpoints.ready(),
        )
        clock.mark("other")
        if bad:
            self.skipped += 1
            self.bad_in_row += 1
        else:
            self.bad_in_row = 0
            apply_gradients(self.optimizer, self.parameters, norm, config.clip)
        self.scale.update(bool(bad))
        if traffic is not None:
            self.sent = {"ring": traffic.ring_bytes(), "gloo": traffic.gloo_bytes()}
        if not self.memory.get("optimizer"):  # until a step was taken: the first is often skipped in float16
            self.memory = tensor_memory(self.strategy.module, self.optimizer)
        self.optimizer.zero_grad()
        clock.mark("optimizer")
        seconds = clock.finish()
        self.stop_agreed = "SIGTERM" if term else "SIGINT" if interrupt else ""
        if ready == world.world_size:
            self.checkpoints.commit()
        self.step += 1
        self.tokens += n_valid
        rate = n_valid / (time.perf_counter() - started)
        return {
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "tokens": self.tokens,
            "tokens_per_s": rate,
            "seconds": seconds,
            "memory": {**self.memory, "peak": peak_bytes(world.device)},
            "sent": self.sent,
            "mfu": mfu(config.model, rate, config.model.block_size, world, config.precision),
            "skipped": self.skipped,
        }

    def learning_rate(self) -> float:
        """Of the step that comes."""
        c = self.config
        return learning_rate_at(
            self.step,
            steps=c.steps,
            peak=c.learning_rate,
            schedule=c.schedule,
            warmup_steps=c.warmup_steps,
            decay_fraction=c.decay_fraction,
            final_fraction=c.final_fraction,
        )

    def evaluate(self) -> float | None:
        """The held-out loss, where there is held-out text."""
        if self.data.val is None:
            return None
        T, tokens = self.config.model.block_size, self.config.eval_tokens
        self.val_loss = held_out_loss(self.strategy, self.data.val, T, tokens)
        self.say(f"step {self.step}: held-out loss {self.val_loss:.4f}")
        return self.val_loss

    def save(self, val_loss: float | None = None, reason: str = "") -> None:
        """Write a checkpoint, or begin to; val_loss is that of these very weights, if it is known."""
        meta = {**self.meta(), "val_loss": val_loss, "reason": reason}
        self.checkpoints.save(self.strategy.module, self.optimizer, meta, val_loss)

    def diverged(self) -> None:
        """Save the last good weights and stop with the reason."""
        reason = f"loss or gradient not finite in {self.bad_in_row} steps in a row, up to step {self.step}"
        self.save(reason=reason)
        self.checkpoints.wait()
        where = self.checkpoints.folder
        raise DivergedError(
            f"{reason}; the weights before them are in {where}. Use a learning_rate below {self.config.learning_rate}, "
            "a longer warm-up, or look for a fault in the data"
        )

    def say(self, text: str) -> None:
        """A line for people, once."""
        if self.world.first:
            tqdm.write(text, file=sys.stderr)
