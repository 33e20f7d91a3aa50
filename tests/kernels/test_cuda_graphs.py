"""Captured in a CUDA graph, and replayed. Where there is no GPU, a replay is another call, which checks the tests."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastreg
from fastreg.core import strengths
from fastreg.core.layout import forget_layouts
from tests.support.helpers import Path
from tests.support.ways import grid

Weights = list[Tensor]


def weights_on(device: str) -> Weights:
    shapes, dtypes = ((40, 7), (5,), (3000,)), (torch.float32, torch.float16, torch.bfloat16)
    return [
        grid(*s, device=device, dtype=d, seed=i).requires_grad_()
        for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def fill(weights: Weights, seed: int) -> None:
    with torch.no_grad():
        for i, w in enumerate(weights):
            w.copy_(grid(*w.shape, device=str(w.device), seed=seed + i))


def captured(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`step` after one warm-up call, as a replay that returns what the captured call returned."""
    if device == "cpu":
        step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def states(weights: Weights, result: Any) -> list[Tensor]:
    grads = [w.grad.clone() for w in weights if w.grad is not None]
    return [t.detach().clone() for t in (*weights, *tree_leaves(result)) if isinstance(t, Tensor)] + grads


def forget() -> None:
    """Everything that was cached is given up, and its memory is overwritten."""
    forget_layouts()
    strengths._CONSTANTS.clear()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        for size in (64, 512, 4096, 1 << 16):
            torch.full((size,), -1, dtype=torch.int64, device="cuda")


def backward(reg: fastreg.ElasticNet) -> Tensor:
    penalty = reg()
    penalty.backward()
    return penalty


def backward_seen_by_a_hook(reg: fastreg.ElasticNet) -> Tensor:
    handle = reg._selection.weights[0].register_hook(lambda grad: None)
    penalty = reg()
    (2 * penalty).backward()
    handle.remove()
    return penalty


STEPS: dict[str, Callable[[fastreg.ElasticNet], Any]] = {
    "value": lambda reg: torch.no_grad()(reg)(return_terms=True),
    "backward": backward,
    "backward_seen_by_a_hook": backward_seen_by_a_hook,
    "add_grad_": lambda reg: reg.add_grad_(),
    "prox_": lambda reg: reg.prox_(0.5),
}
KINDS = ["one strength", "groups"]


def regularizer(weights: Weights, l1: Tensor, impl: str, kind: str) -> fastreg.ElasticNet:
    if kind == "groups":
        groups = [{"params": weights[:1]}, {"params": weights[1:], "l1": 1 / 2, "l2": 1 / 8}]
        return fastreg.ElasticNet(groups, l1, 1 / 4, impl=impl)
    return fastreg.ElasticNet(weights, l1, 1 / 4, impl=impl)


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STEPS)
def test_replays_follow_weights_and_strengths(path: Path, name: str, kind: str, existing: bool) -> None:
    impl, device = path

    def run(replaying: bool) -> list[list[Tensor]]:
        weights = weights_on(device)
        l1 = torch.tensor(1 / 8, device=device)
        reg = regularizer(weights, l1, impl, kind)
        step = STEPS[name]
        if existing:
            for w in weights:
                w.grad = torch.zeros_like(w)
        if replaying:
            replay = captured(lambda: step(reg), device)
            forget()
        else:
            step(reg)
            replay = lambda: step(reg)  # noqa: E731
        seen = []
        for i, strength in enumerate((1 / 4, 0.0, 1.0)):
            fill(weights, seed=10 * i)
            for w in weights:
                if w.grad is not None:
                    w.grad.zero_()
            l1.fill_(strength)
            seen.append(states(weights, replay()))
        return seen

    for replayed, called in zip(run(True), run(False), strict=True):
        assert len(replayed) == len(called)
        for one, other in zip(replayed, called, strict=True):
            assert torch.equal(one, other)


def test_a_whole_step_as_the_pytorch_documentation_captures_it(path: Path) -> None:
    """Gradients are None before the capture: backward makes them in the graph's own memory."""
    impl, device = path

    def train(replaying: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
        start = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        l1 = torch.tensor(0.0, device=device)
        reg = fastreg.ElasticNet(net, l1, 0.01, impl=impl)
        x, y = torch.empty(4, 6, device=device), torch.empty(4, 3, device=device)
        batches = [(torch.randn(4, 6).to(device), torch.randn(4, 3).to(device)) for _ in range(4)]
        x.copy_(batches[0][0])
        y.copy_(batches[0][1])

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            (nn.functional.mse_loss(net(x), y) + reg()).backward()
            optimizer.step()

        run = captured(step, device) if replaying else step
        with torch.no_grad():
            for p, old in zip(net.parameters(), start, strict=True):
                p.copy_(old)
        for i, batch in enumerate(batches):
            x.copy_(batch[0])
            y.copy_(batch[1])
            l1.fill_(0.01 * i)
            run()
        return [p.detach().clone() for p in net.parameters()]

    for replayed, called in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(replayed, called)


class Regularized(nn.Module):
    """A model whose output is its loss, penalty included."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean() + fastreg.elastic_penalty(self.net, 0.01, 0.1)


@pytest.mark.gpu
def test_make_graphed_callables() -> None:
    torch.manual_seed(0)
    model = Regularized().cuda()
    x = torch.randn(4, 6, device="cuda")
    model(x).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    value = model(x).detach()
    model.zero_grad()
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    loss = graphed(x)
    loss.backward()
    torch.testing.assert_close(loss.detach(), value)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.gpu
def test_reduce_overhead() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 8).cuda()
    reg = fastreg.ElasticNet(net, 0.1, 0.2)
    compiled = torch.compile(lambda: 2 * reg(), mode="reduce-overhead", fullgraph=True)
    for i in range(5):
        reg.l1 = 0.1 * i
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled()
        found.backward()
        grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        expected = 2 * reg()
        expected.backward()
        torch.testing.assert_close(found.detach(), expected.detach())
        for p, grad in zip(net.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad)
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.1)
        net.zero_grad()


class NoHostWork(TorchDispatchMode):
    """Fails on every operator but those that a CUDA graph can hold without a copy from the host."""

    ALLOWED = frozenset(
        f"aten.{name}"
        for name in (
            *("empty.memory_format", "as_strided.default", "slice.Tensor", "select.int", "unbind.int"),
            *("empty_like.default", "ones_like.default", "clone.default", "add_.Tensor", "mul.Tensor", "stack.default"),
        )
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A conversion of what is on the device already.
        converts = str(func) == "aten._to_copy.default" and kwargs.get("device") in (None, args[0].device)
        assert str(func) in self.ALLOWED or converts or str(func).startswith("profiler."), func
        return func(*args, **kwargs)


def noted_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on, none of which does anything."""
    launch = pytest.importorskip("fastreg.kernels.launch")
    launched = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **arguments: launched.append(self.name)

    for kernel in ("_sweep_kernel", "_finish_kernel"):
        monkeypatch.setattr(launch, kernel, Kernel(kernel))
    monkeypatch.setattr("fastreg.kernels.INTERPRETED", True)
    return launched


def forbid_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def copies(*args: Any) -> Tensor:
        pytest.fail("a table is built again")

    monkeypatch.setattr("fastreg.kernels.tables.to_device", copies)
    monkeypatch.setattr(strengths, "to_device", copies)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STEPS)
def test_the_hot_path_can_be_captured(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The precondition, where there is no GPU: nothing is read or copied by the host, and no table is built again."""
    launched = noted_launches(monkeypatch)
    weights = weights_on("cpu")
    for w in weights:
        w.grad = torch.zeros_like(w)
    reg = regularizer(weights, torch.tensor(1 / 8), "triton", kind)
    STEPS[name](reg)
    launched.clear()
    forbid_copies(monkeypatch)
    with NoHostWork():
        STEPS[name](reg)
    sweeps = {"value": 1, "backward": 2, "backward_seen_by_a_hook": 2, "add_grad_": 1, "prox_": 1}[name]
    assert launched.count("_sweep_kernel") == 3 * sweeps  # one for each dtype
    assert launched.count("_finish_kernel") == (0 if name == "prox_" else 1)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": partial(fastreg.optim.SGD, lr=0.5, momentum=0.5),
    "Adam": partial(fastreg.optim.Adam, lr=0.5, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_can_be_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise, with a schedule of the learning rate."""
    launched = noted_launches(monkeypatch)
    weights = weights_on("cpu")
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer = OPTIMIZERS[name](weights, l1=1 / 8, prox=True, track=True, impl="triton")
    optimizer.step()
    optimizer.step()
    launched.clear()
    forbid_copies(monkeypatch)
    optimizer.param_groups[0]["lr"] = 0.25
    with NoHostWork():
        optimizer.step()
    assert launched == ["_sweep_kernel"] * 3 + ["_finish_kernel"]


@pytest.mark.parametrize("prox", [False, True], ids=["gradient", "prox"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replayed_steps_go_on_counting(path: Path, name: str, prox: bool) -> None:
    """Each replay is the next step, for gradients that were written anew, and eager steps may follow."""
    impl, device = path

    def run(replaying: bool) -> list[list[Tensor]]:
        weights = weights_on(device)
        lr = torch.tensor(0.5, device=device)
        optimizer = OPTIMIZERS[name](weights, lr=lr, l1=1 / 8, prox=prox, track=True, impl=impl)
        for w in weights:
            w.grad = torch.ones_like(w)

        def step() -> Any:
            optimizer.step()
            return optimizer.last

        found = []
        if replaying:
            replay = captured(step, device)
        else:
            step()  # the call that warms up
            replay = step
        for seed in range(3):
            for i, w in enumerate(weights):
                assert w.grad is not None
                w.grad.copy_(grid(*w.shape, device=device, seed=seed + i))
            lr.mul_(0.5)
            found.append(states(weights, replay()))
        found.append(states(weights, step()))
        counts = [state["step"].clone() for state in optimizer.state.values() if "step" in state]
        return [*found, counts]

    for one, other in zip(run(True), run(False), strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
