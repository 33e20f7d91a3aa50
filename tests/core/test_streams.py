"""Several devices and streams, where there is no GPU: stand-ins that note what is asked of them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastreg
from fastreg.autograd import engine
from fastreg.core import layout
from tests.support.cases import L1, L2, leaf

CPU = torch.device("cpu")


class Stream:
    """Like a torch.cuda.Stream."""

    device = torch.device("cuda", 0)

    def __init__(self, name: str, log: list[tuple[str, Any]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append((f"{self.name} waits", other.name))


@pytest.mark.parametrize("same_stream", [True, False])
def test_callback_waits_for_the_stream_of_the_node(same_stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tells the allocator of every tensor that it reads: upstream gradients and strengths alike."""
    log: list[tuple[str, Any]] = []
    producer = Stream("producer", log)
    streams = [producer, producer if same_stream else Stream("consumer", log)]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.pop(0))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: log.append((stream.name, tensor.item())))

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            tensors = [torch.tensor(1.0), 0.5, torch.tensor(2.0)]
            engine.run_after_backward(lambda: log.append(("called", None)), Stream.device, tensors)
            log.append(("node done", None))
            return upstream

    Node.apply(torch.ones((), requires_grad=True)).backward()
    waits = [("consumer waits", "producer"), ("consumer", 1.0), ("consumer", 2.0)]
    assert log == [("node done", None), *([] if same_stream else waits), ("called", None)]


@pytest.fixture
def _no_layouts() -> Iterator[None]:
    """What the test makes a layout believe is not found again by weights that take the same memory."""
    layout.forget_layouts()
    yield
    layout.forget_layouts()


@pytest.mark.usefixtures("_no_layouts")
@pytest.mark.parametrize("kind", ["floats", "tensors"])
def test_weights_on_two_devices_make_one_value(kind: str) -> None:
    """The second device is the CPU under another name, which a layout is made to believe in."""
    weights = [leaf(torch.randn(n, dtype=dtype)) for n, dtype in ((30, torch.float32), (7, torch.float16))]
    strengths = [torch.tensor(s, dtype=torch.float64) if kind == "tensors" else s for s in (L1, L2)]

    def calls() -> list[Tensor]:
        before = [w.detach().clone() for w in weights]
        found = list(fastreg.elastic_penalty(weights, *strengths, return_terms=True))
        scaled = torch.autograd.grad(3.0 * found[0], weights)
        for w in weights:
            w.grad = None
        found += fastreg.add_elastic_grad_(weights, *strengths)
        fastreg.elastic_prox_(weights, *strengths, lr=0.5)
        found += [*scaled, *(w.grad for w in weights), *(w.detach().clone() for w in weights)]
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)
        return [t.detach().clone() for t in found]

    expected = calls()
    layouts = layout._LAYOUTS[weights[0].data_ptr(), 2]
    for each in layouts:
        first, second = each.parts[CPU]
        each.parts = {CPU: [first], torch.device("cpu", 0): [second]}
    found = calls()
    assert layout._LAYOUTS[weights[0].data_ptr(), 2] is layouts  # which were used, then
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        # The value's float64 sums are added in another order.
        torch.testing.assert_close(one, other, rtol=1e-7, atol=0)


def test_capturing_is_asked_of_the_device_in_question(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreg.core import device_cache

    current = [0]

    class OnDevice:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *args: Any) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert not device_cache.is_capturing(torch.device("cuda", 0))
    assert device_cache.is_capturing(torch.device("cuda", 1))
    assert current == [0]
    current[0] = 1
    assert device_cache.is_capturing(torch.device("cuda", 1))
    assert not device_cache.is_capturing(torch.device("cuda", 0))
    assert not device_cache.is_capturing(CPU)


def test_cached_table_is_awaited_on_other_streams_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastreg.core.device_cache import DeviceCache

    log: list[tuple[str, Any]] = []

    class EventStream(Stream):
        def record_event(self) -> str:
            return f"event of {self.name}"

        def wait_event(self, event: str) -> None:
            self.log.append((f"{self.name} waits", event))

    first, second = EventStream("first", log), EventStream("second", log)
    current = [first]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: log.append((stream.name, tensor.item())))
    cache = DeviceCache(Stream.device, size=2)
    for _ in range(2):
        cache.get("table", lambda: (torch.tensor(3.0), 7))
    assert log == []
    current[0] = second
    cache.get("table", lambda: pytest.fail("built again"))
    assert log == [("second waits", "event of first"), ("second", 3.0)]
