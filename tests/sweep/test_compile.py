"""Inside torch.compile the same numbers come out, from one graph."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastreg
from tests import oracle
from tests.support.cases import L1, L2
from tests.support.helpers import PATHS, Path, needs_compiler

pytestmark = [
    # PyTorch's own compiler still uses what it deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    needs_compiler,
]

# To a compiler the interpreter's kernels are operators like those of a GPU: it need not generate code around them.
GENERATED = [path for path in PATHS if path.id != "interpreter"]
DYNAMIC = [
    pytest.param(*path.values, dynamic, id=f"{path.id}-{dynamic}", marks=path.marks)
    for path in PATHS
    for dynamic in ((None, True, False) if path in GENERATED else (None,))
]


def generates_code(test: Callable[..., None]) -> Callable[..., None]:
    """A test of Inductor, which takes seconds to set itself up in a process."""
    test = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")(test)
    return pytest.mark.parametrize("path", GENERATED)(pytest.mark.xdist_group("inductor")(test))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(device: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 5, dtype=torch.bfloat16), nn.Linear(3, 2).half())
    net[1].frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    net[1].twin = net[0].weight
    return net.to(device)


def weights_of(net: nn.Module) -> list[torch.Tensor]:
    return [p for p in net.parameters() if p.requires_grad]


def check_penalty(backend: str, kind: str, path: Path) -> None:
    impl, device = path
    net = model(device)
    reg = fastreg.ElasticNet(net, L1, L2, exclude="bias", impl=impl)
    weights = [p for name, p in net.named_parameters() if p.requires_grad and "bias" not in name]

    def step() -> torch.Tensor:
        if kind == "object":
            return 2 * reg()
        return 2 * fastreg.elastic_penalty(net, L1, L2, exclude="bias", impl=impl)

    found = torch.compile(step, backend=backend, fullgraph=True)()
    found.backward()

    assert found.item() == pytest.approx(2 * oracle.penalty(weights, L1, L2)[0], rel=1e-6)
    for w in weights:
        assert w.grad is not None
        # Formed by autograd from two float32 terms, one of them by way of float64: one rounding more than the sweep.
        assert oracle.ulp_distance(w.grad, oracle.gradient(w, 2 * L1, 2 * L2)) <= 2


@pytest.mark.parametrize("kind", ["function", "object"])
def test_a_compiled_penalty_has_the_formulas_numbers(kind: str, path: Path) -> None:
    check_penalty("aot_eager", kind, path)


@generates_code
def test_a_penalty_with_generated_code_has_the_formulas_numbers(path: Path) -> None:
    check_penalty("inductor", "object", path)


def set_gradients(net: nn.Module, existing: str) -> None:
    for i, w in enumerate(weights_of(net)):
        w.grad = torch.full_like(w, 0.25) if existing == "all" or (existing == "some" and i % 2) else None


def assert_gradients_as(net: nn.Module, expected: list[torch.Tensor | None]) -> None:
    for w, want in zip(weights_of(net), expected, strict=True):
        assert w.grad is not None
        assert want is not None
        # Inductor fuses multiply and add, and keeps float32 between gradient and sum where eager rounds: one unit of
        # the gradient's rounding, which is several of a sum that cancels.
        assert oracle.ulp_distance(w.grad, oracle.array(want)) <= 4


def assert_shrunk(net: nn.Module, before: list[torch.Tensor]) -> None:
    for w, old in zip(weights_of(net), before, strict=True):
        expected = oracle.prox(old, L1, L2, 0.5)
        assert ((oracle.array(w) == 0) == (expected == 0)).all()
        # The subtraction, the division and the store each round once.
        assert oracle.ulp_distance(w.detach(), expected) <= 2


@pytest.mark.parametrize("existing", ["all", "none"])
def test_compiled_add_grad_adds_as_uncompiled(existing: str, path: Path) -> None:
    impl, device = path
    net = model(device)
    reg = fastreg.ElasticNet(net, L1, L2, impl=impl)

    set_gradients(net, existing)
    expected = reg.add_grad_()
    expected_grads = [w.grad for w in weights_of(net)]
    set_gradients(net, existing)
    found = torch.compile(reg.add_grad_, backend="aot_eager", fullgraph=True)()

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert_gradients_as(net, expected_grads)


def test_compiled_prox_shrinks_by_the_formula(path: Path) -> None:
    impl, device = path
    net = model(device)
    reg = fastreg.ElasticNet(net, L1, L2, impl=impl)
    before = [w.detach().clone() for w in weights_of(net)]
    torch.compile(reg.prox_, backend="aot_eager", fullgraph=True)(0.5)
    assert_shrunk(net, before)


@generates_code
def test_calls_in_place_with_generated_code(path: Path) -> None:
    """Both in one graph: gradients, some of which are there, and the weights after them."""
    impl, device = path
    net = model(device)
    reg = fastreg.ElasticNet(net, L1, L2, impl=impl)
    before = [w.detach().clone() for w in weights_of(net)]

    def step() -> fastreg.Penalty:
        found = reg.add_grad_()
        reg.prox_(0.5)
        return found

    set_gradients(net, "some")
    expected = reg.add_grad_()
    expected_grads = [w.grad for w in weights_of(net)]
    set_gradients(net, "some")
    found = torch.compile(step, backend="inductor", fullgraph=True)()

    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert_gradients_as(net, expected_grads)
    assert_shrunk(net, before)


def check_training(backend: str, dynamic: bool | None, path: Path) -> None:
    impl, device = path
    x, y = torch.randn(16, 12, device=device), torch.randint(0, 3, (16,), device=device)

    def train(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
        reg = fastreg.ElasticNet(net, 1e-3, 1e-2, impl=impl)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def loss() -> torch.Tensor:
            return nn.functional.cross_entropy(net(x), y) + reg()

        step = torch.compile(loss, backend=backend, fullgraph=True, dynamic=dynamic) if compiled else loss
        for _ in range(5):
            optimizer.zero_grad()
            step().backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    for compiled, eager in zip(train(True), train(False), strict=True):
        # Float32 rounding of five steps, in which matrix products are ordered differently.
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("path", "dynamic"), DYNAMIC)
def test_compiled_training_goes_as_uncompiled(path: Path, dynamic: bool | None) -> None:
    check_training("aot_eager", dynamic, path)


@generates_code
def test_training_with_generated_code_goes_as_uncompiled(path: Path) -> None:
    check_training("inductor", None, path)


def compiled_with_counter(call: Callable[..., Any], dynamic: bool | None) -> tuple[Callable[..., Any], CompileCounter]:
    counter = CompileCounter()
    return torch.compile(call, backend=counter, fullgraph=True, dynamic=dynamic), counter


@pytest.mark.parametrize(("path", "dynamic"), DYNAMIC)
@pytest.mark.parametrize("name", ["penalty", "add_grad_", "prox_", "groups"])
def test_strengths_that_change_compile_nothing_again(name: str, path: Path, dynamic: bool | None) -> None:
    impl, device = path
    net = model(device)
    params = [{"params": net[0]}, {"params": net[2:], "l1": 0.5}] if name == "groups" else net
    reg = fastreg.ElasticNet(params, L1, L2, impl=impl)
    calls = {"penalty": reg, "groups": reg, "add_grad_": lambda: reg.add_grad_().total, "prox_": lambda: reg.prox_(0.1)}
    for w in weights_of(net):
        w.grad = torch.zeros_like(w)
    call, counter = compiled_with_counter(calls[name], dynamic)
    for i in range(5):
        reg.l1, reg.l2 = 0.01 * i, torch.tensor(0.02 * i, device=device) if i == 4 else 0.02 * i
        before = reg().detach()
        found = call()
        if name == "prox_":
            assert reg().item() < before.item() or i == 0
        else:
            torch.testing.assert_close(found, before, rtol=1e-6, atol=0)
    # A float and a tensor look the same to the compiler, but for their dtype.
    assert counter.frame_count <= 2
    compiled = counter.frame_count
    reg.l2 = torch.tensor(0.7, device=device)
    call()
    assert counter.frame_count == compiled


@pytest.mark.parametrize("kind", ["tensor", "float"])
def test_strengths_passed_as_arguments(kind: str, path: Path) -> None:
    """Floats are the compiler's to generalise: it compiles once more, when the first of them changes."""
    impl, device = path
    net = model(device)

    def step(l1: float | torch.Tensor, lr: float | torch.Tensor) -> torch.Tensor:
        fastreg.elastic_prox_(net, l1, L2, lr=lr, impl=impl)
        return fastreg.elastic_penalty(net, l1, L2, impl=impl)

    call, counter = compiled_with_counter(step, None)
    for i in range(1, 6):
        strength, lr = 0.01 * i, 0.002 * i
        given = [torch.tensor(x, device=device) if kind == "tensor" else x for x in (strength, lr)]
        found = call(*given)
        torch.testing.assert_close(found, fastreg.elastic_penalty(net, strength, L2, impl=impl), rtol=1e-6, atol=0)
    assert counter.frame_count == (1 if kind == "tensor" else 2)


def test_weights_of_changing_sizes_compile_once_more(path: Path) -> None:
    impl, device = path
    call, counter = compiled_with_counter(lambda w: fastreg.elastic_penalty(w, L1, L2, impl=impl), None)
    for n in (5, 6, 7, 30):
        w = torch.randn(n, 3, device=device, requires_grad=True)
        call(w).backward()
        assert w.grad is not None
        assert oracle.ulp_distance(w.grad, oracle.gradient(w, L1, L2)) <= 2
    assert counter.frame_count == 2


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_an_attached_step(mode: str, path: Path) -> None:
    impl, device = path

    def train(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        net = nn.Linear(12, 3).to(device)
        x = torch.randn(16, 12).to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        fastreg.ElasticNet(net, 1e-2, 1e-1, impl=impl).attach(optimizer, mode=mode)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            step()
        return [p.detach() for p in net.parameters()]

    for compiled, eager in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_inside_a_compiled_function(transform: str, path: Path) -> None:
    impl, device = path
    w = torch.randn(4, 6, dtype=torch.float64, device=device)

    def penalty(w: torch.Tensor) -> torch.Tensor:
        return fastreg.elastic_penalty(w, L1, L2, impl=impl)

    def transformed(w: torch.Tensor) -> Any:
        if transform == "vmap":
            return torch.func.vmap(penalty)(w)
        if transform == "grad":
            return torch.func.grad(penalty)(w)
        return torch.func.jvp(penalty, (w,), (w.cos(),))

    found = torch.compile(transformed, backend="aot_eager", fullgraph=True)(w)
    torch.testing.assert_close(found, transformed(w))


def test_a_checkpointed_layer_in_a_compiled_step(path: Path) -> None:
    impl, device = path
    w = torch.randn(6, 4, device=device, requires_grad=True)
    x = torch.randn(3, 6, device=device)

    def loss() -> torch.Tensor:
        hidden = torch.utils.checkpoint.checkpoint(lambda w: (x @ w).tanh(), w, use_reentrant=False)
        return hidden.sum() + fastreg.elastic_penalty(w, L1, L2, impl=impl)

    (expected,) = torch.autograd.grad(loss(), w)
    torch.compile(loss, backend="aot_eager", fullgraph=True)().backward()
    torch.testing.assert_close(w.grad, expected)


def test_strengths_assigned_by_the_compiled_code(path: Path) -> None:
    impl, device = path
    net = model(device)

    class Scheduled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reg = fastreg.ElasticNet(net, 0.0, L2, impl=impl)
            self.steps = 0

        def forward(self) -> torch.Tensor:
            self.steps += 1
            self.reg.l1 = 0.1 * self.steps
            return self.reg()

    scheduled = Scheduled()
    compiled = torch.compile(scheduled, backend="aot_eager")
    for i in range(1, 4):
        expected = oracle.penalty(weights_of(net), 0.1 * i, L2)[0]
        assert compiled().item() == pytest.approx(expected, rel=1e-6)
    scheduled.reg.l1 = 2.0
    again = torch.compile(scheduled.reg, backend="aot_eager")()
    assert again.item() == pytest.approx(oracle.penalty(weights_of(net), 2.0, L2)[0], rel=1e-6)


def test_strengths_keep_their_digits(path: Path) -> None:
    """0.1 is not a float32, and what is made in inference mode is not for inference only."""
    impl, device = path
    w = torch.randn(50, dtype=torch.float64, device=device, requires_grad=True)
    with torch.inference_mode():
        reg = fastreg.ElasticNet(w, 0.5, 0.2, impl=impl)
        reg.l1 = 0.1
    found = torch.compile(lambda: reg(), backend="aot_eager", fullgraph=True)()
    found.backward()
    assert found.item() == pytest.approx(oracle.penalty([w], 0.1, 0.2)[0], rel=1e-14)
    assert w.grad is not None
    assert oracle.ulp_distance(w.grad, oracle.gradient(w, 0.1, 0.2)) <= 2


def test_floats_of_groups_compile_once_more(path: Path) -> None:
    impl, device = path
    first, second = (torch.randn(n, device=device, requires_grad=True) for n in (5, 7))

    def penalty(a: float, b: float) -> torch.Tensor:
        groups = [{"params": first, "l1": a}, {"params": second, "l1": b}]
        return fastreg.elastic_penalty(groups, l2=L2, impl=impl)

    call, counter = compiled_with_counter(penalty, None)
    for i in range(1, 6):
        expected = oracle.penalty([first], 0.1 * i, L2)[0] + oracle.penalty([second], 0.3 * i, L2)[0]
        assert call(0.1 * i, 0.3 * i).item() == pytest.approx(expected, rel=1e-6)
    assert counter.frame_count == 2


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, path: Path) -> None:
    impl, device = path

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).sum() + fastreg.elastic_penalty(self.net, L1, L2, impl=impl)

    loss, x = Loss().to(device), torch.randn(4, 6, device=device)
    program = torch.export.export(loss, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), loss(x))
