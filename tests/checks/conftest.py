"""Exercises run small tensors: one thread, so that tests side by side do not fight for the cores."""

import pytest
import torch

pytest.register_assert_rewrite("exercise_harness")
torch.set_num_threads(1)
