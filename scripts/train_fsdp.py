"""Train a GPT with FSDP: each process keeps its share of weights, gradients and averages, and gathers what it needs.

    ./scripts/launch_fsdp.sh --nproc 4 --steps 200 --out runs/mine
    torchrun --standalone --nproc-per-node 8 scripts/train_fsdp.py --preset gpt2-xl --precision bf16 --batch-size 480

--batch-size is that of all processes together: however many there are, it is the same run, with the same losses.
Started again, it goes on from the newest checkpoint in --out, with any number of processes. Ctrl-C saves first.
"""

from dataclasses import dataclass
from pathlib import Path

from gpt2course.train import TrainConfig, World, fsdp, load_data, run, train


@dataclass(frozen=True)
class Config(TrainConfig):
    """Train a GPT with FSDP. The defaults train a small one on the Python standard library's source."""

    out: Path = Path("runs/fsdp")
    """folder of the run: config.json, metrics.jsonl, checkpoints/"""
    reshard_after_forward: bool = True
    """free a block's weights after its forward pass and gather them again; --no-… keeps them: faster, more memory"""
    replicas: int = 1
    """HSDP: so many copies of the model, each sharded over its part of the processes"""
    cpu_offload: bool = False
    """keep weights and averages in the CPU's memory: slow, but larger models fit"""


def main(config: Config, world: World) -> None:
    """The single script's three lines; only the strategy differs."""
    data = load_data(config, world)
    strategy = fsdp(
        config,
        world,
        reshard_after_forward=config.reshard_after_forward,
        replicas=config.replicas,
        cpu_offload=config.cpu_offload,
    )
    train(config, strategy, data)


if __name__ == "__main__":
    run(main, Config)
