"""What a call costs besides time: launches, and memory that it needs while it runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.counting import count


def launches(call: Callable[[], object], device: torch.device) -> int:
    """The kernels, fills and copies that a call launches on a GPU; elsewhere the operators that it dispatches."""
    if device.type != "cuda":
        return len(count(call))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events: Any = profiler.events()
    return sum(
        event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False) for event in events
    )


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds at any moment beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    result: Any = profiler.profiler
    events = [e for e in result.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
