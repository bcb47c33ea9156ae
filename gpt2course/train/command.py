"""The frame around a training script: read the options, refuse what can't be, join the others, train, part."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from gpt2course.train.config import TrainConfig, parse, refusal
from gpt2course.train.world import World, connect, guarded

Config = TypeVar("Config", bound=TrainConfig)


def run(main: Callable[[Config, World], object], config_class: type[Config], most: int | None = None) -> NoReturn:
    """The command line of a script: `main(config, world)` in each process that torchrun started, or in this one alone.

    Impossible options end the script with all of them listed and exit code 2, before it joins the others.

    Args:
        main: what to do.
        config_class: its options.
        most: processes it can use; None for as many as there are.
    """
    config = _parse(config_class)
    world_size = config.check if config.check is not None else int(os.environ.get("WORLD_SIZE", 1))
    found = config.problems(world_size)
    if most is not None and world_size > most:
        found.append(f"{world_size} processes, and this script uses {most}; use train_ddp.py or train_fsdp.py")
    if found:
        _refuse(refusal(found))
    if config.check is not None:
        print(config)
        sys.exit(0)

    def body() -> None:
        world = connect(config.device)
        try:
            if world.first:
                print(config, flush=True)
            main(config, world)
        except (ValueError, OSError) as error:
            if world.first:
                print(f"{sys.argv[0]}: {error}", file=sys.stderr)
            raise

    guarded(body)


def _parse(config_class: type[Config]) -> Config:
    try:
        return parse(config_class)
    except ValueError as error:
        _refuse(str(error))


def _refuse(text: str) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of each machine: what is missing may be missing on one of them
        print(text, file=sys.stderr)
    sys.exit(2)
