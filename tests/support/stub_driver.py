"""A stand-in for Triton's CUDA driver: the real JIT binds, specialises and compiles; a launch is noted, not made."""

import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest

knobs = pytest.importorskip("triton.knobs")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)


class Launch(NamedTuple):
    """What a launcher is given."""

    kernel: str  # its name
    by_jit: bool  # or else by the compiled kernel itself
    device: int  # the current one
    loaded_on: int  # the device that the binary was loaded on
    grid: tuple[int, int, int]
    metadata: Any  # of the compilation, its options among them
    signature: dict[str, str]  # the type of each parameter; "constexpr" is one
    arguments: dict[str, Any]  # of all parameters

    @property
    def packed(self) -> dict[str, Any]:
        """The arguments that a launcher hands to the device, in their order: it drops the constexprs."""
        return {name: value for name, value in self.arguments.items() if self.signature[name] != "constexpr"}


class StubDriver:
    """What Triton asks of a driver, and what it did with the answers."""

    def __init__(self) -> None:
        self.device = 0
        self.compiled: list[CompiledKernel] = []
        self.launches: list[Launch] = []
        self._by_jit = False
        self.launcher_cls = functools.partial(functools.partial, self._launch)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=self._load_binary,
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def clear(self) -> None:
        """Forgets what was noted; what the JIT and the library have cached stays."""
        self.compiled.clear()
        self.launches.clear()

    def before_jit(self, *arguments: Any, **keywords: Any) -> None:
        self._by_jit = True

    def after_compilation(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        self.compiled.append(fn.jit_function.device_caches[compile["device"]][0][key])

    def _load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, int, int, int, int]:
        assert binary.startswith(b"\x7fELF"), "no cubin"
        n_registers, n_spills, most_threads = 0, 0, 1024
        return object(), device, n_registers, n_spills, most_threads  # the function is known by where it is

    def _launch(
        self, source: Any, metadata: Any, x: int, y: int, z: int, stream: int, function: int, *rest: Any
    ) -> None:
        _packed_metadata, _launch_metadata, _enter_hook, _exit_hook, *values = rest
        arguments = dict(zip(source.signature, values, strict=True))
        name, by_jit, self._by_jit = source.fn.__name__, self._by_jit, False
        self.launches.append(
            Launch(name, by_jit, self.device, function, (x, y, z), metadata, source.signature, arguments)
        )


@contextmanager
def stub_driver(kernels: Sequence[Any]) -> Iterator[StubDriver]:
    """Triton has this driver, and has compiled nothing of `kernels` yet."""
    stub = StubDriver()
    with ExitStack() as stack:
        caches = [defaultdict(kernel.create_binder) for kernel in kernels]
        for kernel, cache in zip(kernels, caches, strict=True):
            stack.enter_context(mock.patch.multiple(kernel, device_caches=cache, pre_run_hooks=[stub.before_jit]))
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.jit_post_compile_hook = stub.after_compilation
        driver.set_active(stub)
        try:
            yield stub
        finally:
            driver.set_active(None)  # found again at the next use
            for compiled in (each for cache in caches for found, *_ in cache.values() for each in found.values()):
                compiled.module = None  # or newer versions of Triton ask a driver to unload it
