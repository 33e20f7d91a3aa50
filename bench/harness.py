"""One measurement: rounds of a call, each next to a round of what it is compared with."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from bench import profiling
from bench.clock import clock_for, host_seconds, seconds

# Passes over the weights that each task must make, reads and writes together, in fastreg's design; through backward,
# one in the forward pass and three after it.
PASSES = {"value": 1, "backward": 4, "add_grad": 3, "prox": 2}
MOST_ROUNDS = 200
LEAST_ROUNDS = 5
COPY_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}


class Quantiles(NamedTuple):
    """p20, p50 and p80."""

    p20: float
    p50: float
    p80: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Linear interpolation between the two nearest values."""
    ordered = sorted(values)

    def at(q: float) -> float:
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Quantiles(at(0.2), at(0.5), at(0.8))


def ratios(times: Sequence[float], references: Sequence[float]) -> list[float]:
    """Each round by the reference round that was run right before it: what slows both cancels."""
    return [time / reference for time, reference in zip(times, references, strict=True)]


class Harness:
    """Measures on one device in one dtype.

    Args:
        budget: seconds that the rounds of a case may take, more or less.
        rounds: how many, or None for as many as fit the budget.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, budget: float, rounds: int | None) -> None:
        self.device, self.dtype = device, dtype
        self.budget, self.rounds = budget, rounds
        self.clock = clock_for(device)
        self._floor: tuple[int, Callable[[], object]] | None = None

    def floor(self, n: int) -> Callable[[], object]:
        """`g.add_(w, alpha=c)` over one flat tensor of n elements: the three passes that no gradient can do without."""
        if self._floor is None or self._floor[0] != n:
            self._floor = None  # gives back the memory of the last before it takes that of the next
            w = torch.randn(n, device=self.device).mul_(0.02).to(self.dtype)
            grad = torch.zeros_like(w)
            self._floor = n, lambda: grad.add_(w, alpha=1e-3)
        return self._floor[1]

    def copy_bandwidth(self) -> float:
        """Bytes per second that one tensor's copy into another reads and writes; both are larger than any cache."""
        source = torch.zeros(COPY_ELEMENTS[self.device.type], device=self.device)
        target = torch.zeros_like(source)
        times = [seconds(self.clock, lambda: target.copy_(source)) for _ in range(7)]
        return 2 * source.numel() * source.element_size() / statistics.median(times)

    def measure(
        self,
        benchmark: Any,
        call: Callable[[], object],
        reference: Callable[[], object],
        before: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """Times `call` with pytest-benchmark, each round right after one of `reference`.

        Args:
            benchmark: the fixture, with the timer of this device.
            before: called untimed ahead of each round.
        """
        references: list[float] = []

        def setup() -> None:
            before()
            references.append(seconds(self.clock, reference))
            self.clock.cool()

        call()
        rounds = self.rounds or self._rounds(call, reference)
        benchmark.pedantic(call, setup=setup, rounds=rounds)
        times = benchmark.stats.stats.data
        return {
            "rounds": rounds,
            "seconds": quantiles(times)._asdict(),
            "reference_seconds": quantiles(references)._asdict(),
            "ratio": quantiles(ratios(times, references))._asdict(),
        }

    def costs(self, call: Callable[[], object], count_launches: bool = True) -> dict[str, Any]:
        """What `call` takes besides time on the device; None where that cannot be known."""
        return {
            "launches": profiling.launches(call, self.device) if count_launches else None,
            "peak_extra_bytes": profiling.peak_extra_bytes(call, self.device),
            "host_seconds": host_seconds(call) if self.device.type == "cuda" else None,
        }

    def _rounds(self, call: Callable[[], object], reference: Callable[[], object]) -> int:
        once = min(seconds(self.clock, call) + seconds(self.clock, reference) for _ in range(2))
        least = 3 if once > self.budget else LEAST_ROUNDS
        return max(least, min(MOST_ROUNDS, int(self.budget / once)))


def bandwidth(task: str, n_bytes: int, time: float, copy: float) -> dict[str, float]:
    """How fast a task moved the bytes it must, and as a share of what a copy reaches.

    Args:
        n_bytes: of all weights together.
    """
    moved = PASSES[task] * n_bytes
    return {"bytes": moved, "bytes_per_second": moved / time, "share_of_copy": moved / time / copy}
