"""Train a GPT with DDP: each process has all of the model, and the gradients are summed over the processes.

    ./scripts/launch_ddp.sh --nproc 2 --steps 200 --out runs/mine
    torchrun --standalone --nproc-per-node 8 scripts/train_ddp.py --preset gpt2 --precision bf16 --batch-size 480

--batch-size is that of all processes together: however many there are, it is the same run, with the same losses.
Started again, it goes on from the newest checkpoint in --out. Ctrl-C saves first.
"""

from dataclasses import dataclass
from pathlib import Path

from gpt2course.train import TrainConfig, World, ddp, load_data, run, train


@dataclass(frozen=True)
class Config(TrainConfig):
    """Train a GPT with DDP. The defaults train a small one on the Python standard library's source."""

    out: Path = Path("runs/ddp")
    """folder of the run: config.json, metrics.jsonl, checkpoints/"""
    bucket_mb: float = 25.0
    """MiB of gradients that travel together; each bucket starts as soon as the backward pass has filled it"""


def main(config: Config, world: World) -> None:
    """The single script's three lines; only the strategy differs."""
    data = load_data(config, world)
    strategy = ddp(config, world, bucket_mb=config.bucket_mb)
    train(config, strategy, data)


if __name__ == "__main__":
    run(main, Config)
