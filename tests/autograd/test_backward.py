"""The penalty's gradient on its way to .grad where nobody watches: both of the library's ways against autograd's."""

import copy

import pytest
import torch
from torch import Tensor, nn

import fastreg
from tests import oracle
from tests.support.cases import DTYPES
from tests.support.helpers import Path
from tests.support.ways import L1, L2, WAYS, Scenario, Scene, check_against_autograd, grid


def alone(scene: Scene) -> None:
    scene.penalty().backward()


def onto_present_gradients(scene: Scene) -> list[bool]:
    for i, w in enumerate(scene.weights):
        w.grad = torch.empty_like(w).copy_(grid(*w.shape, device=scene.device, seed=20 + i)).detach()
    present = [w.grad for w in scene.weights]
    scene.penalty().backward()
    return [w.grad is grad for w, grad in zip(scene.weights, present, strict=True)]


def with_a_data_loss(scene: Scene) -> None:
    (scene.loss() + scene.penalty()).backward()


def before_a_data_loss(scene: Scene) -> None:
    penalty = scene.penalty()
    (penalty + scene.loss()).backward()


def weights_that_the_loss_does_not_use(scene: Scene) -> None:
    (scene.loss(scene.weights[2:4]) + scene.penalty()).backward()


def weights_that_the_penalty_does_not_use(scene: Scene) -> None:
    (scene.loss() + scene.penalty(scene.weights[:2])).backward()


def strengths_of_zero(scene: Scene) -> None:
    scene.penalty(l1=0.0, l2=0.0).backward()


def upstream_gradient_of_four(scene: Scene) -> None:
    (scene.loss() + 4 * scene.penalty()).backward()


def upstream_gradient_of_zero(scene: Scene) -> None:
    (scene.loss() + 0 * scene.penalty()).backward()


def upstream_gradient_below_zero(scene: Scene) -> None:
    scene.penalty().backward(torch.tensor(-2.0, device=scene.device))


def upstream_gradient_computed_on_the_device(scene: Scene) -> None:
    factor = scene.weights[0].detach().abs().max() * 4
    (scene.penalty() * factor).backward()


def mean_over_micro_batches(scene: Scene) -> None:
    for _ in range(4):
        ((scene.loss() + scene.penalty()) / 4).backward()


def all_terms_weighted(scene: Scene) -> None:
    total, l1_term, l2_term = scene.terms()
    (total + 2 * l1_term - 4 * l2_term).backward()


def only_the_l1_term(scene: Scene) -> None:
    scene.terms()[1].backward()


def only_the_l2_term(scene: Scene) -> None:
    (scene.loss() + 2 * scene.terms()[2]).backward()


def terms_one_after_the_other(scene: Scene) -> None:
    total, l1_term, l2_term = scene.terms()
    for term in (l2_term, l1_term, total):
        term.backward(retain_graph=True)


def learnable_strengths(scene: Scene) -> list[Tensor | None]:
    l1, l2 = (torch.tensor(s, device=scene.device, requires_grad=True) for s in (L1, L2))
    (scene.loss() + 2 * scene.penalty(l1=l1, l2=l2)).backward()
    return [l1.grad, l2.grad]


def of_copied_weights(scene: Scene) -> list[Tensor | None]:
    scene.penalty().backward()
    copies = copy.deepcopy(scene.weights)
    scene.watch(copies)
    scene.penalty(copies).backward()
    return [w.grad for w in copies]


def onto_gradients_of_other_strides(scene: Scene) -> None:
    for i, w in enumerate(scene.weights):
        backwards = grid(*reversed(w.shape), device=scene.device, dtype=w.dtype, seed=20 + i)
        w.grad = backwards.permute(*reversed(range(w.ndim)))
    scene.penalty().backward()


def sparse_embedding(scene: Scene) -> nn.Embedding:
    weight = grid(6, 4, device=scene.device, seed=5)
    embedding = nn.Embedding(6, 4, sparse=True, _weight=weight)
    scene.watch([embedding.weight])
    return embedding


def with_sparse_gradients(scene: Scene) -> list[Tensor | None]:
    embedding = sparse_embedding(scene)
    index = torch.tensor([1, 3, 1], device=scene.device)
    (embedding(index).sum() + scene.penalty([embedding.weight])).backward()
    return [embedding.weight.grad]


def onto_sparse_gradients(scene: Scene) -> list[Tensor | None]:
    embedding = sparse_embedding(scene)
    embedding(torch.tensor([1, 3, 1], device=scene.device)).sum().backward()
    scene.penalty([embedding.weight]).backward()
    embedding(torch.tensor([0, 3], device=scene.device)).sum().backward()
    return [embedding.weight.grad]


def tied_weights(scene: Scene) -> list[Tensor | None]:
    embedding = nn.Embedding(6, 4, _weight=grid(6, 4, device=scene.device, seed=5))
    head = nn.Linear(4, 6, bias=False, device=scene.device)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    scene.watch([embedding.weight])
    output = model(torch.tensor([1, 3, 1], device=scene.device))
    (output.sum() + scene.penalty(list(model.parameters()))).backward()
    return [embedding.weight.grad]


SCENARIOS: list[Scenario] = [
    alone,
    onto_present_gradients,
    with_a_data_loss,
    before_a_data_loss,
    weights_that_the_loss_does_not_use,
    weights_that_the_penalty_does_not_use,
    strengths_of_zero,
    upstream_gradient_of_four,
    upstream_gradient_of_zero,
    upstream_gradient_below_zero,
    upstream_gradient_computed_on_the_device,
    mean_over_micro_batches,
    all_terms_weighted,
    only_the_l1_term,
    only_the_l2_term,
    terms_one_after_the_other,
    learnable_strengths,
    of_copied_weights,
    onto_gradients_of_other_strides,
    with_sparse_gradients,
    onto_sparse_gradients,
    tied_weights,
]


# PyTorch says once that such gradients are slow.
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_cannot_be_told_from_autograd(
    path: Path, scenario: Scenario, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_against_autograd(way, path, scenario, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_scale_rescues_strengths_that_fp16_cannot_hold(path: Path, way: str) -> None:
    w = torch.randn(300, device=path[1]).half().requires_grad_()
    scene = Scene(way, path, lambda device: [w])
    l1 = 1e-5  # subnormal in fp16, with three significant bits

    (scene.penalty(l1=l1, l2=0.0) * 65536.0).backward()

    assert w.grad is not None
    assert oracle.ulp_distance(w.grad, oracle.gradient(w, l1 * 65536.0, 0.0)) <= oracle.GRADIENT_ULPS[w.dtype]


@pytest.mark.parametrize(("l1", "upstream"), [(1e-4, 1.0), (1e-4, 0.37), (0.0, 1.0), (0.0, -3e-2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_give_the_same_bits(path: Path, dtype: torch.dtype, l1: float, upstream: float) -> None:
    # Tiny weights too: without l1 their gradients round to zeros of either sign.
    values = torch.randn(500).to(dtype) * torch.logspace(0, -7, 500, dtype=torch.float64).to(dtype)

    def bits(way: str, n_backward: int) -> Tensor:
        scene = Scene(way, path, lambda device: [values.to(device, copy=True).requires_grad_()])
        for _ in range(n_backward):
            (upstream * scene.penalty(l1=l1, l2=1e-3)).backward()
        grad = scene.weights[0].grad
        assert grad is not None
        return grad.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])

    # The interpreter's additions truncate in bfloat16, autograd's and a GPU's do not.
    truncates = path == ("triton", "cpu") and dtype == torch.bfloat16
    for n_backward in (1,) if truncates else (1, 3):
        assert torch.equal(bits("direct", n_backward), bits("ordinary", n_backward))


@pytest.mark.parametrize("way", WAYS)
def test_new_gradients_obey_the_layout_contract(path: Path, way: str) -> None:
    """As PyTorch's accumulate_grad.h has it: the strides of a dense weight, else those of a contiguous tensor."""

    def strided(device: str) -> list[Tensor]:
        a, b, c, d, e = (grid(8, 6, 4, device=device) for _ in range(5))
        views = [a, b.permute(2, 0, 1), c[::2].transpose(0, 2), d[:, :1], e[:, :, ::2]]
        return [view.detach().requires_grad_() for view in views]

    def strides(way: str) -> list[tuple[int, ...]]:
        scene = Scene(way, path, strided)
        (scene.loss() + scene.penalty()).backward()
        kept = [w.grad.stride() for w in scene.weights if w.grad is not None]
        for w in scene.weights:
            w.grad = None
        scene.penalty().backward()
        return kept + [w.grad.stride() for w in scene.weights if w.grad is not None]

    assert strides(way) == strides("naive")


def test_a_copied_model_has_a_penalty_of_its_own(path: Path) -> None:
    impl, device = path
    model = nn.Linear(3, 2, device=device)
    reg = fastreg.ElasticNet(model, L1, L2, impl=impl)
    copied, copied_reg = copy.deepcopy((model, reg))

    copied_reg().backward()

    assert model.weight.grad is None
    assert copied.weight.grad is not None
    assert oracle.ulp_distance(copied.weight.grad, oracle.gradient(model.weight, L1, L2)) <= 1


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_a_gradient_beyond_the_dtype_is_infinite(path: Path, factor: float) -> None:
    impl, device = path
    w = torch.tensor([1.0, -2.0], device=device, requires_grad=True)
    (factor * fastreg.elastic_penalty(w, l1=1e39, impl=impl)).backward()
    assert torch.equal(w.grad, factor * torch.tensor([torch.inf, -torch.inf], device=device))
