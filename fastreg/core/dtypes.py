"""Dtypes of the arithmetic, the sums and the value."""

from collections.abc import Sequence

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic for weights of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def value_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """Return the dtype of the value for weights of `dtypes`."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums: float64, or float32 on Apple's GPUs, which lack float64."""
    return torch.float32 if device.type == "mps" else torch.float64
