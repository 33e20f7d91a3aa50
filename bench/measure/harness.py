"""One measurement: rounds of a call, each right after a round of what it is compared with."""

import argparse
import itertools
import statistics
import time
import timeit
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.static.ledger import count

SECONDS_PER_CASE = {"cpu": 1.5, "cuda": 0.5}  # of rounds, if their number is not given; a GPU repeats itself better
MOST_ROUNDS, LEAST_ROUNDS = 200, 5
COPY_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
Within = Callable[[Any], AbstractContextManager[object]]  # what a turn of the call with this key takes place in
Pairs = Sequence[tuple[float, float]]  # seconds of a call, and of the reference right before it


class CudaInstant:
    """A point in the stream. Making one waits for nothing; a difference of two waits for the later one."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "CudaInstant") -> float:
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1e3  # seconds


def quantiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(values, q)) for q in (20, 50, 80)}


def compared(pairs: Pairs) -> dict[str, Any]:
    """Quantiles of the times, and of their ratios: what slows both of a pair cancels."""
    seconds, references = zip(*pairs, strict=True)
    ratios = [own / reference for own, reference in pairs]
    found = {"seconds": seconds, "reference_seconds": references, "ratio": ratios}
    return {"rounds": len(ratios), **{name: quantiles(values) for name, values in found.items()}}


class Harness:
    """Measures on one device in one dtype, in `rounds`, or if None in as many as fit SECONDS_PER_CASE."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rounds: int | None = None) -> None:
        self.device, self.dtype, self.rounds = device, dtype, rounds
        self.on_gpu = device.type == "cuda"
        # Only differences of what it returns are taken.
        self.timer: Callable[[], Any] = CudaInstant if self.on_gpu else time.perf_counter
        if self.on_gpu:
            l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            self._flush = torch.empty(max(4 * l2_bytes, 1 << 28), dtype=torch.int8, device=device)

    def cool(self) -> None:
        """On a GPU, evicts everything from L2. The host runs on meanwhile, so that no launch's latency is timed."""
        if self.on_gpu:
            torch.cuda.synchronize()
            self._flush.zero_()

    def seconds(self, call: Call) -> float:
        self.cool()
        start = self.timer()
        call()
        return float(self.timer() - start)

    def floor(self, n: int) -> Call:
        """`g.add_(w, alpha=c)` over one flat tensor of n elements: the three passes that no gradient can do without."""
        w = torch.randn(n, device=self.device).mul_(0.02).to(self.dtype)
        grad = torch.zeros_like(w)
        return lambda: grad.add_(w, alpha=1e-3)

    def copy_bandwidth(self) -> float:
        """Bytes per second that one tensor's copy into another reads and writes; both are larger than any cache."""
        source = torch.zeros(COPY_ELEMENTS[self.device.type], device=self.device)
        target = torch.zeros_like(source)
        times = [self.seconds(lambda: target.copy_(source)) for _ in range(7)]
        return 2 * source.numel() * source.element_size() / statistics.median(times)

    def take_turns(
        self, calls: Mapping[Key, Call], reference: Call, rounds: int, within: Within = nullcontext, warm_up: int = 0
    ) -> dict[Key, Pairs]:
        """The times of all calls, which take turns in each round, each with `reference` right before it."""
        times: dict[Key, list[tuple[float, float]]] = {key: [] for key in calls}
        for _ in range(warm_up + rounds):
            for key, call in calls.items():
                with within(key):
                    before = self.seconds(reference)
                    times[key].append((self.seconds(call), before))
        return {key: pairs[warm_up:] for key, pairs in times.items()}

    def measure(self, benchmark: Any, call: Call, reference: Call, before: Call = lambda: None) -> dict[str, Any]:
        """Times `call` with pytest-benchmark, each round right after one of `reference`; `before` is not timed."""
        references: list[float] = []

        def setup() -> None:
            before()
            references.append(self.seconds(reference))
            self.cool()

        call()
        rounds = self.rounds
        if rounds is None:
            once = min(self.seconds(call) + self.seconds(reference) for _ in range(2))
            seconds = SECONDS_PER_CASE[self.device.type]
            least = 3 if once > seconds else LEAST_ROUNDS
            rounds = max(least, min(MOST_ROUNDS, int(seconds / once)))
        benchmark.pedantic(call, setup=setup, rounds=rounds)
        return compared(list(zip(benchmark.stats.stats.data, references, strict=True)))

    def host_seconds(self, call: Call) -> float | None:
        """Until the call returns to a host that is idle; None without a GPU, where there is no difference."""
        if not self.on_gpu:
            return None
        once = timeit.timeit(call, torch.cuda.synchronize, number=1)
        repeat = max(3, min(30, int(SECONDS_PER_CASE["cuda"] / once)))
        return statistics.median(timeit.repeat(call, torch.cuda.synchronize, repeat=repeat, number=1))


def launches(call: Call, device: torch.device) -> int:
    """The kernels, fills and copies that a call launches on a GPU; elsewhere the operators that it dispatches."""
    if device.type != "cuda":
        return len(count(call))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device)


def peak_extra_bytes(call: Call, device: torch.device) -> int:
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
    changes = (event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(changes, initial=0))


def command_line(description: str | None, rounds: int | None) -> argparse.ArgumentParser:
    """The arguments that all commands take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--results", type=Path, help="a folder for the results file; without it none is written")
    return parser
