"""Calls in the middle of others: signal handlers, and threads that share caches."""

import signal
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreg
from fastreg.core import layout, strengths
from fastreg.core.device_cache import DeviceCache
from fastreg.selection import selection
from tests import oracle
from tests.support.cases import L1, L2, leaf


def run_in_threads(n: int, call: Any) -> None:
    """Runs `call(i)` in n threads that start together; raises what one of them raised."""
    failures: list[BaseException] = []
    together = threading.Barrier(n)

    def run(i: int) -> None:
        together.wait()
        try:
            call(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.fixture
def frequent_switches() -> Any:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("mode", ["value", "add_grad_"])
def test_penalty_in_a_signal_handler_does_not_disturb_the_one_it_interrupts(mode: str) -> None:
    weights = [leaf(torch.full((n,), 2.0)) for n in (700, 3, 1 << 15, 90)]
    others = [leaf(torch.full((n,), 0.5)) for n in (650, 11, 1 << 15, 40)]
    exact, exact_other = oracle.penalty(weights, L1, L2)[0], oracle.penalty(others, L1, L2)[0]
    seen: list[float] = []

    def value(tensors: list[Tensor]) -> float:
        if mode == "value":
            return float(fastreg.elastic_penalty(tensors, L1, L2).detach())
        return float(fastreg.add_elastic_grad_(tensors, L1, L2).total)

    def handler(number: int, frame: Any) -> None:
        seen.append(value(others))
        if len(seen) < 300:
            signal.setitimer(signal.ITIMER_REAL, 1e-4)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        found = []
        signal.setitimer(signal.ITIMER_REAL, 1e-4)
        while len(seen) < 300:
            found.append(value(weights))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [f for f in found if f != pytest.approx(exact, rel=1e-6)] == []
    assert [f for f in seen if f != pytest.approx(exact_other, rel=1e-6)] == []


def test_layouts_stored_by_many_threads(frequent_switches: None) -> None:
    models = [[torch.full((n,), 1.0) for n in (3, 5)] for _ in range(3 * layout.MOST_KEYS)]
    expected = oracle.penalty(models[0], L1, L2)[0]

    def call(i: int) -> None:
        for weights in models[i::8] * 6:
            found = fastreg.elastic_penalty(weights, L1, L2)
            assert float(found) == pytest.approx(expected, rel=1e-6)

    run_in_threads(8, call)
    assert len(layout._LAYOUTS) <= layout.MOST_KEYS


def test_selections_are_stored_under_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one, a thread that makes room would meet another that stores: seldom, and so asked for here."""

    class Guarded(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            assert selection._REMEMBERING.locked()
            super().__setitem__(key, value)

        def __delitem__(self, key: Any) -> None:
            assert selection._REMEMBERING.locked()
            super().__delitem__(key)

    monkeypatch.setattr(selection, "_REMEMBERED", Guarded())
    weights = [torch.ones(3) for _ in range(selection.MOST_REMEMBERED + 2)]
    for w in weights:
        fastreg.elastic_penalty([w], L1, L2)
    assert len(selection._REMEMBERED) == selection.MOST_REMEMBERED


def test_device_cache_filled_by_many_threads(frequent_switches: None) -> None:
    cache = DeviceCache(torch.device("cpu"), size=4)

    def call(i: int) -> None:
        for k in range(3000):
            assert cache.get(k % 9, lambda k=k: k % 9) == k % 9

    run_in_threads(8, call)
    assert len(cache._entries) <= 4


def test_constants_of_many_threads(frequent_switches: None) -> None:
    strengths._CONSTANTS.clear()
    w = [torch.ones(3), torch.ones(4)]

    def call(i: int) -> None:
        for k in range(200):
            groups = [{"params": w[0], "l1": 0.25 * i}, {"params": w[1], "l1": float(k)}]
            assert float(fastreg.elastic_penalty(groups)) == 0.75 * i + 4.0 * k

    run_in_threads(8, call)


def test_scratch_memory_is_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreg.blocks import scratch
    from fastreg.blocks.penalty import BlockOps

    w = leaf(torch.ones(1000))
    fastreg.elastic_penalty(w, L1, L2)
    kept = scratch._KEPT.memory
    assert kept is not None

    def fails(*args: Any) -> None:
        raise ArithmeticError

    with monkeypatch.context() as patch:
        patch.setattr(BlockOps, "sums", fails)
        with pytest.raises(ArithmeticError):
            fastreg.elastic_penalty(w, L1, L2)
    assert scratch._KEPT.memory is kept
