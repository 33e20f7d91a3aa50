"""Tables that are copied to a device once, and what becomes of them while a CUDA graph is captured."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from fastreg.core import device_cache
from fastreg.core.device_cache import DeviceCache, to_device, written_by_kernels
from fastreg.core.layout import Part

CPU = torch.device("cpu")


class Table:
    """Something that a weak reference can follow."""


def test_a_table_is_built_once_and_the_oldest_makes_room() -> None:
    cache = DeviceCache(CPU, size=2)
    built: list[str] = []

    def get(key: str) -> Table:
        return cache.get(key, lambda: built.append(key) or Table())

    assert get("a") is get("a")
    get("b")
    get("c")
    get("c")
    get("a")
    assert built == ["a", "b", "c", "a"]


@pytest.mark.parametrize("captured", [True, False])
def test_a_captured_table_outlives_its_cache(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cache, "_CAPTURED", {})
    cache = DeviceCache(CPU, size=1)
    table = weakref.ref(cache.get("table", Table))
    monkeypatch.setattr(device_cache, "is_capturing", lambda device: captured)
    cache.get("table", Table)
    monkeypatch.setattr(device_cache, "is_capturing", lambda device: False)
    cache.get("another", Table)
    gc.collect()
    assert (table() is not None) == captured


def test_what_only_a_replay_fills_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DeviceCache(CPU, size=2)
    monkeypatch.setattr(device_cache, "is_capturing", lambda device: True)
    of_the_graph = cache.get("table", Table)
    monkeypatch.setattr(device_cache, "is_capturing", lambda device: False)
    assert cache.get("table", Table) is not of_the_graph


def test_tables_made_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        table = DeviceCache(CPU, size=1).get("table", lambda: torch.zeros(2))
    assert not table.is_inference()


@pytest.mark.parametrize(
    "table",
    [
        torch.tensor([2**62 + 1, -(2**53) - 1, 0]),
        torch.tensor([[2**53 + 1, 7], [-3, 0]]),
        torch.tensor([0.1, 1e-300, 1e300], dtype=torch.float64),
        torch.empty(0, dtype=torch.int64),
        torch.empty((0, 4), dtype=torch.int64),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_way_to_a_device_keeps_all_digits(table: Tensor, device: str) -> None:
    for copy in (to_device, written_by_kernels):
        found = copy(table, torch.device(device))
        assert found.device.type == device
        assert found.dtype == table.dtype
        assert torch.equal(found.cpu(), table)


@pytest.mark.parametrize("capturing", [True, False])
def test_while_capturing_nothing_is_copied_from_the_host(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    ways: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(device_cache, "written_by_kernels", lambda tensor, device: ways.append("kernels") or tensor)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: ways.append("copy") or torch.zeros(0))
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **kwargs: self)
    to_device(torch.ones(2), gpu)
    assert ways == ["kernels" if capturing else "copy"]
    assert device_cache.is_capturing(gpu) == capturing
    assert not device_cache.is_capturing(CPU)


@pytest.mark.gpu
def test_a_table_is_awaited_on_other_streams() -> None:
    """Filled on a stream that is kept busy, read on another one."""
    cache = DeviceCache(torch.device("cuda", 0), size=1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        cache.get("table", lambda: to_device(torch.arange(1000), cache.device))
    table: Tensor = cache.get("table", lambda: pytest.fail("built again"))
    assert table.clone().cpu().tolist() == list(range(1000))


def test_pointer_tables() -> None:
    tables = pytest.importorskip("fastreg.kernels.tables")
    part = Part(torch.float32, CPU)
    for numel, group in ((5000, 1), (0, 0), (2048, 0), (1, 1)):
        part.add(len(part.positions), 16 * numel, numel, group)
    pointers = tables.PointerTables(part)
    found = pointers.of_weights()
    # Address, number of elements, group and tensor of each chunk.
    assert found.chunks.tolist() == [
        *([80000, 2048, 1, 0], [80000 + 2048 * 4, 2048, 1, 0], [80000 + 4096 * 4, 904, 1, 0], [0, 0, 0, 1]),
        *([32768, 2048, 0, 2], [16, 1, 1, 3]),
    ]
    assert found.n_chunks == 6
    assert pointers.of_weights() is found
