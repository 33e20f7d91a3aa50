"""A peer's forms under torch.compile."""

from collections.abc import Callable
from typing import Any

import torch

# Without CUDA graphs, which would hold the weights and gradients of a training loop at fixed addresses.
MODES = (("compiled", "default"), ("max-autotune", "max-autotune-no-cudagraphs"))


def compile_tasks(tasks: dict[str, Callable[[], Any]], mode: str) -> dict[str, Callable[[], Any]]:
    """Each task compiled as one graph at its first call."""
    return {name: torch.compile(task, mode=mode, fullgraph=True) for name, task in tasks.items()}
