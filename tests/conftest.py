"""Shared by all tests: one thread, one seed, small shapes, and property tests that repeat exactly."""

import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

from gpt2course import GPT, GPTConfig

settings.register_profile(
    "gpt2course",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gpt2course")
torch.set_num_threads(1)


WORST = pytest.StashKey[dict[str, tuple[float, int]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the campaigns marked long, which take many minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    for item in items:
        if "long" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="a campaign of many minutes; run it with --long"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WORST] = {}


@pytest.fixture(scope="session")
def worst(pytestconfig: pytest.Config) -> Callable[[str, float], None]:
    """`worst(name, error)` keeps the largest error of each name, and the last lines of the run print them."""

    def note(name: str, error: float) -> None:
        largest, count = pytestconfig.stash[WORST].get(name, (0.0, 0))
        pytestconfig.stash[WORST][name] = max(largest, error), count + 1

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, (error, count) in sorted(config.stash[WORST].items()):
        terminalreporter.write_line(f"worst error of {count:,} cases, {name}: {error:.1e}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small() -> GPTConfig:
    """A GPT-2 in miniature whose vocabulary is short enough to look at every logit."""
    return GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=32, vocab_size=97)


@pytest.fixture(scope="session")
def lively() -> Callable[..., GPT]:
    """Makes models whose every parameter is random and large, biases and layer norms too.

    GPT-2's own start (0.02, zero biases) leaves attention nearly uniform, and would forgive a wrong mask or head.
    """

    def make(config: GPTConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> GPT:
        model = GPT(config).to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)
        return model

    return make
