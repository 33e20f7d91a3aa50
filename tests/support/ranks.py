"""Cases that run on several processes: what they are told and use, and the processes, which serve all test files."""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.helpers import Path

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


def by_name(*cases: Case) -> dict[str, Case]:
    """The CASES of a module."""
    return {case.__name__: case for case in cases}


# For test files whose cases share processes: they run in one worker of pytest-xdist.
on_processes = [pytest.mark.skipif(not AVAILABLE, reason="needs gloo"), pytest.mark.xdist_group("processes")]


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


# Imported once, by a process that the others are forks of. Not this package, which that process might find elsewhere.
PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.testing", "numpy", "pytest"]
DEADLINE = 200.0  # seconds for a case, which takes one or two; beyond the collectives' own
GRACE = 5.0  # seconds that the other ranks have to fail too


def processes() -> Any:
    """Starts processes without CUDA and threads of this one, and quickly where there is a fork server."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(PRELOADED)
    return context


class Team:
    """Processes that run one case after the other, until one fails: after that nobody knows what they wait for."""

    def __init__(self, world: int, path: Path, folder: FilePath) -> None:
        context = processes()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, path, str(folder), theirs), daemon=True)
            process.start()
            theirs.close()  # else its end would not be seen
            self.pipes.append(ours)
            self.processes.append(process)
        self.is_usable = True

    def run(self, module: str, name: str, deadline: float = DEADLINE) -> str:
        """Runs `CASES[name]` of a module on every rank; returns what went wrong, and where."""
        assert self.is_usable
        # Until every rank has said that all is well.
        self.is_usable = False
        outcomes: dict[int, str] = {}
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send((module, name))
            except OSError:
                outcomes[rank] = self._death(rank)
        end = time.monotonic() + deadline
        while len(outcomes) < len(self.pipes):
            if any(outcomes.values()):
                end = min(end, time.monotonic() + GRACE)
            pending = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in outcomes}
            ready = wait(list(pending), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                outcomes |= dict.fromkeys(pending.values(), "was still running\n")
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]
                try:
                    outcomes[rank] = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    outcomes[rank] = self._death(rank)
        self.is_usable = not any(outcomes.values())
        return "".join(f"rank {rank}: {outcome}" for rank, outcome in sorted(outcomes.items()) if outcome)

    def _death(self, rank: int) -> str:
        self.processes[rank].join(GRACE)
        return f"died with exit code {self.processes[rank].exitcode}\n"

    def close(self) -> None:
        for pipe in self.pipes:
            if self.is_usable:
                pipe.send(None)
            pipe.close()
        for process in self.processes:
            process.join(GRACE if self.is_usable else 0.0)
            process.kill()
            process.join()
        self.is_usable = False


class Teams:
    """One team for each path and number of processes, from the first case on that needs it."""

    def __init__(self, new_folder: Callable[[], FilePath]) -> None:
        self.teams: dict[tuple[int, Path], Team] = {}
        self.new_folder = new_folder

    def run(self, module: str, name: str, world: int, path: Path) -> None:
        """Runs `CASES[name]` of a module on every rank; fails with what went wrong, and where."""
        if path[1] == "cuda" and torch.cuda.device_count() < world:
            pytest.skip(f"needs {world} GPUs")
        if path == ("triton", "cpu") and world > 2:
            pytest.skip("minutes of interpretation, which two processes show as well")
        key = world, path
        if key not in self.teams:
            self.teams[key] = Team(world, path, self.new_folder())
        failure = self.teams[key].run(module, name)
        if failure:
            self.teams.pop(key).close()
            pytest.fail(f"{name} on {world} processes\n{failure}", pytrace=False)

    def close(self) -> None:
        for team in self.teams.values():
            team.close()
        self.teams.clear()


def _serve(rank: int, world: int, path: Path, folder: str, pipe: Connection) -> None:
    impl, device = path
    start(rank, world, folder, device)
    while (asked := pipe.recv()) is not None:
        module, name = asked
        torch.manual_seed(0)
        outcome = ""
        try:
            importlib.import_module(module).CASES[name](Ranks(rank, world, impl, device))
        except BaseException:
            outcome = traceback.format_exc()
        pipe.send(outcome)
        if outcome:
            return  # the others may be waiting in a collective that will not come
    dist.destroy_process_group()
