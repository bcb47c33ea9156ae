"""Train a GPT in one process, on one GPU or on the CPU.

    python scripts/train_single_gpu.py --steps 200 --out runs/mine
    python scripts/train_single_gpu.py --preset gpt2 --corpus shards/fineweb-edu --precision bf16 --batch-size 480 \
        --grad-accum-steps 30

Started again, it goes on from the newest checkpoint in --out. Ctrl-C saves first.
"""

from dataclasses import dataclass
from pathlib import Path

from gpt2course.train import TrainConfig, World, load_data, run, single, train


@dataclass(frozen=True)
class Config(TrainConfig):
    """Train a GPT in one process. The defaults train a small one on the Python standard library's source."""

    out: Path = Path("runs/single")
    """folder of the run: config.json, metrics.jsonl, checkpoints/"""


def main(config: Config, world: World) -> None:
    """One model, one optimizer, one loop."""
    data = load_data(config, world)
    strategy = single(config, world)
    train(config, strategy, data)


if __name__ == "__main__":
    run(main, Config, most=1)
