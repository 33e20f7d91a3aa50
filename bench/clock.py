"""Two clocks with one face: the host's, and on a GPU the device's own, with a cold cache before every reading."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class HostClock:
    """The wall clock, for devices that have finished when the call returns."""

    @staticmethod
    def now() -> float:
        return time.perf_counter()

    def cool(self) -> None:
        """Nothing: caches are left as the calls leave them."""


class CudaClock:
    """CUDA events. A reading waits for nothing; a difference of two waits for the later one."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._flush = torch.empty(max(4 * l2_bytes, 1 << 28), dtype=torch.int8, device=device)

    @staticmethod
    def now() -> "CudaInstant":
        return CudaInstant()

    def cool(self) -> None:
        """Evicts everything from L2. The host runs on meanwhile, so that a launch's latency is not timed with it."""
        torch.cuda.synchronize()
        self._flush.zero_()


class CudaInstant:
    """A point in the stream."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "CudaInstant") -> float:
        """Seconds since `earlier`."""
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3


Clock = HostClock | CudaClock


def clock_for(device: torch.device) -> Clock:
    """The clock that times work on `device`."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def timer_for(device: torch.device) -> Callable[[], Any]:
    """What pytest-benchmark is given as its timer: only differences are taken."""
    return CudaClock.now if device.type == "cuda" else HostClock.now


def seconds(clock: Clock, call: Callable[[], object]) -> float:
    """One timed call."""
    clock.cool()
    start = clock.now()
    call()
    return clock.now() - start  # type: ignore[operator]


def host_seconds(call: Callable[[], object], rounds: int = 30) -> float:
    """The median time until a call on a GPU returns to the host, which has nothing else to wait for."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(found)
