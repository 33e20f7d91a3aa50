"""What is remembered of weights and gradients between calls, and every way in which they can change."""

import contextlib
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastreg
from fastreg.core import layout, torch_private
from tests import oracle
from tests.support.cases import L1, L2
from tests.support.helpers import Path, assert_value


@pytest.fixture(autouse=True, params=["guards", "nothing found again"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param != "guards":
        monkeypatch.setattr(torch_private, "_TensorGuards", None)
    else:
        assert torch_private._TensorGuards is not None
    layout.forget_layouts()
    yield
    layout.forget_layouts()


def parameters(device: str) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(*shape, device=device)) for shape in ((4, 6), (5,), (2, 3, 4))]


def check(weights: list[nn.Parameter], path: Path) -> None:
    """One call of each kind, against the oracle."""
    chosen = [w for w in weights if w.requires_grad]
    expected = oracle.penalty(chosen, L1, L2)
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in chosen) else torch.float32
    before = [None if w.grad is None else w.grad.to_dense().clone() for w in weights]
    found = fastreg.add_elastic_grad_(weights, L1, L2, impl=path[0])
    for actual, exact in zip(found, expected, strict=True):
        assert_value(actual, exact, path, dtype)
    for w, old in zip(weights, before, strict=True):
        if not w.requires_grad:
            assert w.grad is old is None or torch.equal(w.grad, old)
            continue
        assert w.grad is not None
        added = torch.from_numpy(oracle.gradient(w, L1, L2)).to(w.device, w.dtype)
        wanted = added if old is None else old + added
        torch.testing.assert_close(w.grad, wanted, atol=1e-5 if w.dtype != torch.bfloat16 else 3e-2, rtol=1e-5)


def same_place(w: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    address = w.data_ptr()
    w.data = change(w.data)
    assert w.data_ptr() == address


CHANGES: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "nothing": lambda ws: None,
    "values": lambda ws: ws[0].data.mul_(3.0),
    "moved": lambda ws: setattr(ws[1], "data", torch.randn_like(ws[1])),
    "shorter, in the same place": lambda ws: same_place(ws[1], lambda t: t[:3]),
    "another shape, in the same place": lambda ws: same_place(ws[0], lambda t: t.view(3, 8)),
    "transposed, in the same place": lambda ws: same_place(ws[0], lambda t: t.t()),
    "with gaps, in the same place": lambda ws: same_place(ws[2], lambda t: t[:, ::2]),
    "another dtype, in the same place": lambda ws: same_place(ws[0], lambda t: t.view(torch.bfloat16)[:, ::2].zero_()),
    "wider, in the same place": lambda ws: same_place(ws[0], lambda t: t.view(torch.float64).zero_()),
    "frozen": lambda ws: ws[1].requires_grad_(False),
    "first frozen": lambda ws: ws[0].requires_grad_(False),
    "no gradients": lambda ws: [setattr(w, "grad", None) for w in ws],
    "one gradient less": lambda ws: setattr(ws[2], "grad", None),
    "gradient moved": lambda ws: setattr(ws[0], "grad", torch.ones_like(ws[0])),
    "gradient of other strides": lambda ws: setattr(ws[0], "grad", torch.ones(6, 4, device=ws[0].device).t()),
    "gradient with gaps": lambda ws: setattr(ws[1], "grad", torch.ones(10, device=ws[1].device)[::2]),
    "sparse gradient": lambda ws: setattr(ws[0], "grad", torch.ones_like(ws[0].detach()).to_sparse()),
    "gradient that requires one": lambda ws: setattr(ws[0], "grad", torch.ones_like(ws[0].detach()).requires_grad_()),
}


def _drop_gradients_of_other_kinds(weights: list[nn.Parameter]) -> None:
    for w in weights:
        if w.grad is not None and (w.grad.shape != w.shape or w.grad.dtype != w.dtype):
            w.grad = None


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(path: Path, change: str) -> None:
    weights = parameters(path[1])
    for _ in range(3):
        check(weights, path)
    if "another dtype" in change or "wider" in change:
        weights[0].grad = None  # which PyTorch wants gone first
    CHANGES[change](weights)
    _drop_gradients_of_other_kinds(weights)
    for _ in range(3):
        check(weights, path)


def test_gradients_that_are_refused_are_refused_again(path: Path) -> None:
    weights = parameters(path[1])
    for _ in range(3):
        check(weights, path)
    with torch.inference_mode():
        weights[1].grad = torch.ones_like(weights[1])
    kept = weights[0].grad.clone()  # type: ignore[union-attr]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="inference"):
            fastreg.add_elastic_grad_(weights, L1, L2, impl=path[0])
    assert torch.equal(weights[0].grad, kept)  # type: ignore[arg-type]


def test_a_square_weight_that_is_transposed_where_it_is(path: Path) -> None:
    """With a gradient that is not: as large, in the same place, and laid out as it was."""
    weights = [nn.Parameter(torch.randn(5, 5, device=path[1])), nn.Parameter(torch.randn(3, device=path[1]))]
    for _ in range(3):
        check(weights, path)
    same_place(weights[0], lambda t: t.t())
    for _ in range(3):
        weights[0].grad = torch.zeros(5, 5, device=path[1])
        check(weights, path)


def test_a_gradient_of_another_shape_is_refused_before_anything_is_written(path: Path) -> None:
    memory = torch.zeros(64, device=path[1])
    first, second = nn.Parameter(torch.ones(3, device=path[1])), nn.Parameter(torch.ones(10, device=path[1]))
    first.grad, second.grad = torch.zeros_like(first), memory[:10]
    for _ in range(3):
        fastreg.add_elastic_grad_([first, second], L1, L2, impl=path[0])
    kept = first.grad.clone()
    memory.zero_()
    second.data = torch.ones(40, device=path[1])
    for _ in range(3):
        with pytest.raises(ValueError, match="shape"):
            fastreg.add_elastic_grad_([first, second], L1, L2, impl=path[0])
    assert torch.equal(first.grad, kept)
    assert not memory.any()


def test_groups_are_part_of_what_is_known(path: Path) -> None:
    weights = parameters(path[1])
    for l1 in (0.5, 0.25, 2.0):
        for split in (1, 2):
            groups = [{"params": weights[:split], "l1": l1}, {"params": weights[split:], "l1": 2 * l1}]
            for _ in range(3):
                found = fastreg.elastic_penalty(groups, l2=0.0, impl=path[0])
                expected = oracle.penalty(weights[:split], l1, 0.0)[0] + oracle.penalty(weights[split:], 2 * l1, 0.0)[0]
                assert_value(found, expected, path)


def test_modes_and_penalties_that_alternate_are_all_remembered(path: Path) -> None:
    if torch_private._TensorGuards is None:
        pytest.skip("layouts are built anew")
    weights = parameters(path[1])

    def calls() -> list[layout.Layout | None]:
        found = []
        for groups in ([0, 0, 0], [0, 1, 1]):
            for mode in (contextlib.nullcontext(), torch.autocast(path[1], torch.bfloat16)):
                with mode:
                    known = layout.find_layout(weights, groups)
                    members = [weights[:1], weights[1:]] if groups[1] else [weights]
                    params = [{"params": ws, "l1": 0.5 + group} for group, ws in enumerate(members)]
                    fastreg.elastic_penalty(params, impl=path[0])
                found.append(known)
        return found

    for _ in range(3):
        calls()
    first, second = calls(), calls()
    assert None not in first
    assert first == second


def test_no_model_is_kept_alive(path: Path) -> None:
    weights = parameters(path[1])
    for _ in range(3):
        check(weights, path)
    assert (layout.find_layout(weights, [0, 0, 0]) is None) == (torch_private._TensorGuards is None)
    alive = [weakref.ref(t) for w in weights for t in (w, w.grad)]
    del weights
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


def test_layouts_of_the_same_memory_share_what_was_prepared_for_it(path: Path) -> None:
    """Under autocast PyTorch's guards differ, and tables must not be built again for it."""
    weights = parameters(path[1])
    fastreg.elastic_penalty(weights, L1, L2, impl=path[0])
    with torch.autocast(path[1], torch.bfloat16):
        fastreg.elastic_penalty(weights, L1, L2, impl=path[0])
    key = weights[0].data_ptr(), len(weights)
    parts = [list(each.parts.values()) for each in layout._LAYOUTS[key]]
    assert len(parts) == 2
    assert parts[0][0][0] is parts[1][0][0]


def test_what_is_kept_does_not_grow() -> None:
    weights = [nn.Parameter(torch.randn(3)) for _ in range(layout.MOST_KEYS + 9)]
    for w in weights:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for _ in range(2 * layout.MOST_PER_KEY):
                with torch.autocast("cpu", dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32):
                    fastreg.elastic_penalty([w], L1, L2)
    assert len(layout._LAYOUTS) == layout.MOST_KEYS
    assert all(1 <= len(known) <= layout.MOST_PER_KEY for known in layout._LAYOUTS.values())


def test_python_asks_little_of_each_tensor(path: Path, request: pytest.FixtureRequest) -> None:
    """Calls from Python for each further tensor: a hundred of them are a hundred microseconds that a GPU waits for."""
    if path[0] == "torch" or torch_private._TensorGuards is None:
        pytest.skip("blocks are handled in Python, and layouts are built anew")

    from fastreg.kernels import launch

    def calls(n_tensors: int, as_module: bool) -> Counter[str]:
        weights = [nn.Parameter(torch.ones(3, device=path[1])) for _ in range(n_tensors)]
        params: Any = nn.ParameterList(weights) if as_module else weights
        reg = fastreg.ElasticNet(params, L1, L2, impl=path[0])
        for _ in range(3):
            reg.add_grad_()
        counted: Counter[str] = Counter()

        def profile(frame: Any, event: str, arg: Any) -> None:
            if event in ("call", "c_call"):
                counted[
                    f"{frame.f_code.co_filename}: {frame.f_code.co_name} {event} {getattr(arg, '__name__', '')}"
                ] += 1

        with pytest.MonkeyPatch.context() as patch:
            # The interpreter stands in for a GPU, and is not what is counted.
            for name in ("_sweep_kernel", "_finish_kernel"):
                patch.setattr(launch, name, _NoKernel())
            sys.setprofile(profile)
            try:
                reg.add_grad_()
            finally:
                sys.setprofile(None)
        return counted

    for as_module in (False, True):
        more = calls(80, as_module) - calls(40, as_module)
        assert more.total() <= 40, more


class _NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: None


def test_guards_of_one_mode_do_not_serve_another(path: Path) -> None:
    """States of a proximal step may have a dtype that gradients must not have."""
    impl, device = path
    w = nn.Parameter(torch.ones(50, device=device, dtype=torch.bfloat16))
    optimizer = torch.optim.Adagrad([w], lr=0.1, foreach=False)
    optimizer.state[w]["sum"] = torch.ones(50, device=device)
    reg = fastreg.ElasticNet([w], l1=0.5, impl=impl)
    reg.attach(optimizer, mode="prox")
    w.grad = torch.ones_like(w)
    optimizer.step()
    w.grad = None
    w.grad_dtype = torch.float32
    w.grad = torch.zeros(50, device=device)
    with pytest.raises(TypeError, match=r"float32 .* but the weight is torch\.bfloat16"):
        reg.add_grad_()
