"""Gradients that go through autograd are ordinary tensors, each with memory of its own."""

import io

import pytest
import torch
from torch import Tensor, nn

import fastreg
from tests.support.cases import L1, L2
from tests.support.helpers import Path


def gradients(path: Path) -> list[Tensor]:
    weights = [torch.randn(*shape, device=path[1], requires_grad=True) for shape in ((4,), (300, 50), (7,))]
    return list(torch.autograd.grad(fastreg.elastic_penalty(weights, L1, L2, impl=path[0]), weights))


def test_changing_one_does_not_touch_graphs_of_another(path: Path) -> None:
    grads = gradients(path)
    x = torch.ones(4, device=path[1], requires_grad=True)
    product = (grads[0] * x).sum()  # saves grads[0]
    grads[1].mul_(2)
    product.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, grads[0])


def test_they_may_be_multiplied_in_place_by_something_learnt(path: Path) -> None:
    grads = gradients(path)
    before = grads[0].clone()
    learnt = torch.tensor(2.0, device=path[1], requires_grad=True)
    grads[0].mul_(learnt).sum().backward()
    assert learnt.grad is not None
    torch.testing.assert_close(learnt.grad, before.sum())


def test_each_has_a_storage_of_its_size(path: Path) -> None:
    grads = gradients(path)
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
    for g in grads:
        assert g.untyped_storage().nbytes() <= g.numel() * g.element_size() + 512
        assert g._base is None
    file = io.BytesIO()
    torch.save(grads[0], file)
    assert file.tell() < 4096


def test_resizing_one_leaves_its_neighbour_alone(path: Path) -> None:
    grads = gradients(path)
    before = grads[1].clone()
    grads[0].resize_(4096).fill_(7.0)
    assert torch.equal(grads[1], before)


@pytest.mark.parametrize("upstream", ["same", "different"])
def test_rescaling_looks_at_the_scale_of_both_terms(path: Path, upstream: str) -> None:
    """Gradients formed in the forward pass for factors of 1 are corrected where either factor differs."""
    impl, device = path
    factor = 3.0 if upstream == "different" else 1.0
    for scaled in (0, 1):
        w = torch.tensor([0.5, -2.0, 0.25], device=device, requires_grad=True)
        w.register_hook(lambda grad: None)
        terms = fastreg.elastic_penalty(w, 0.25, 0.5, return_terms=True, impl=impl)[1:]
        (factor * terms[scaled] + terms[1 - scaled]).backward()
        f1, f2 = (factor, 1.0) if scaled == 0 else (1.0, factor)
        assert w.grad is not None
        assert torch.equal(w.grad, (f1 * 0.25 * w.sign() + f2 * w).detach())


def test_assigned_data_raises_whichever_way_the_gradient_takes(path: Path) -> None:
    impl, device = path
    for is_hooked in (False, True):
        for data in (
            torch.full((6,), 5.0, device=device),
            torch.ones(2, 3, device=device),
            torch.ones(3, device=device),
        ):
            model = nn.Module()
            model.w = nn.Parameter(torch.ones(6, device=device))
            if is_hooked:
                model.w.register_hook(lambda grad: None)
            penalty = fastreg.elastic_penalty(model, L1, L2, impl=impl)
            model.w.data = data.to(device)
            with pytest.raises(RuntimeError, match=r"modified by an in-place operation, or given other \.data"):
                penalty.backward()
            assert model.w.grad is None


def test_data_of_another_shape_in_the_same_memory_raises(path: Path) -> None:
    impl, device = path
    for is_hooked in (False, True):
        w = nn.Parameter(torch.ones(6, device=device))
        if is_hooked:
            w.register_hook(lambda grad: None)
        penalty = fastreg.elastic_penalty(w, L1, L2, impl=impl)
        w.data = w.data.view(2, 3)
        with pytest.raises(RuntimeError, match="modified by an in-place operation"):
            penalty.backward()
        assert w.grad is None
