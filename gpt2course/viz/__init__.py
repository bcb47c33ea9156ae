"""Figures (pure functions: data in, matplotlib Figure out), how they are shown, and widgets over them."""

from gpt2course.viz.show import show

__all__ = ["show"]
