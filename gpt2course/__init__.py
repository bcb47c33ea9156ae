"""gpt2course: build GPT-2, change it, train it. The package behind the notebooks."""

from typing import TYPE_CHECKING, Any

from gpt2course.config import PRESETS, GPTConfig

if TYPE_CHECKING:
    from gpt2course.model import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`GPT` is imported when first asked for: the command line starts without torch, and the doctor needs none."""
    if name == "GPT":
        from gpt2course.model import GPT

        return GPT
    raise AttributeError(f"module 'gpt2course' has no attribute {name!r}")
