"""Cases that run on several processes: what they are told and use, and how a test module starts them."""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import Path

AVAILABLE = dist.is_available() and dist.is_gloo_available() and sys.platform != "win32"
if AVAILABLE:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, distribute_tensor


class Ranks(NamedTuple):
    """What a case is told of the process it runs in."""

    rank: int
    world: int
    impl: str
    device: str

    def mesh(self, *shape: int, names: tuple[str, ...] | None = None) -> "DeviceMesh":
        return init_device_mesh(self.device, shape or (self.world,), mesh_dim_names=names)


class Wire(TorchDispatchMode):
    """Records the collectives: their names, and the bytes that a rank gives to each."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t is not Tensor and issubclass(t, DTensor) for t in types):
            return NotImplemented  # what it does to its parts comes by here again
        name = str(func)
        if name.startswith(("c10d.", "_c10d_functional.")) and not name.split(".")[1].startswith(("wait", "_wrap")):
            n_bytes = sum(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, Tensor))
            self.collectives.append((name.split(".")[1].strip("_"), n_bytes))
        return func(*args, **(kwargs or {}))


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(found: Any, expected: Any) -> None:
    # Numbers around 1, some of them differences of such: a few float32 roundings.
    torch.testing.assert_close(full(found.detach()), full(expected.detach()), rtol=1e-6, atol=5e-7)


def assert_sharded_like(grad: Tensor | None, w: Tensor) -> None:
    assert isinstance(grad, DTensor) == isinstance(w, DTensor)
    if isinstance(grad, DTensor):
        assert grad.placements == w.placements
        assert grad.device_mesh == w.device_mesh
        assert grad.to_local().shape == w.to_local().shape


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same on every rank; some of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return torch.where(values.abs() < 0.3, 0.0, values).to(dtype)


def sharded(values: list[Tensor], layout: list[tuple["DeviceMesh", list[Any]] | None], device: str) -> list[Tensor]:
    """Each tensor on its mesh with its placements, or plain."""
    weights = []
    for value, where in zip(values, layout, strict=True):
        placed = value.to(device) if where is None else distribute_tensor(value.to(device), *where)
        weights.append(nn.Parameter(placed))
    return weights


Case = Callable[[Ranks], None]


def run_cases(cases: dict[str, Case], world: int, path: Path, folder: FilePath) -> list[dict[str, str]]:
    """By rank and case, what went wrong. One set of processes serves all cases: starting it takes the time."""
    if path[1] == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    if path == ("triton", "cpu") and world > 2:
        pytest.skip("minutes of interpretation, which two processes show as well")
    failure = ""
    try:
        spawn(_worker, args=(cases, world, path, str(folder)), nprocs=world)
    except Exception as error:
        failure = str(error)
    files = [folder / f"{rank}.pt" for rank in range(world)]
    assert all(file.exists() for file in files), failure
    return [torch.load(file) for file in files]


def check(outcomes: list[dict[str, str]], name: str) -> None:
    """Fails with what went wrong in a case, and where."""
    for rank, of_rank in enumerate(outcomes):
        assert name in of_rank, f"rank {rank} did not come this far"
        assert not of_rank[name], f"rank {rank}: {of_rank[name]}"


def start(rank: int, world: int, folder: str, device: str = "cpu") -> None:
    """Joins this process to the others."""
    torch.set_num_threads(1)
    # The loopback device: a machine's own name does not resolve everywhere.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )


def _worker(rank: int, cases: dict[str, Case], world: int, path: Path, folder: str) -> None:
    impl, device = path
    start(rank, world, folder, device)
    outcomes = {}
    for name, case in cases.items():
        try:
            case(Ranks(rank, world, impl, device))
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
            break  # the others may be waiting in a collective that will not come
        finally:
            torch.save(outcomes, f"{folder}/{rank}.pt")
    if all(not outcome for outcome in outcomes.values()):
        dist.barrier()
    dist.destroy_process_group()
