"""One sweep over a list of weights, on whatever devices they are: staging, dispatch, and the value's last step."""

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastreg import reference
from fastreg.plan import Mode, plan_for
from fastreg.recall import Known, recall, remember
from fastreg.strengths import UNSCALED, Measure, Scale, Strengths, measure


@torch.no_grad()
def sweep(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    mode: Mode,
    strengths: Strengths,
    *,
    scale: Scale = UNSCALED,
    grads: Sequence[Tensor] | None = None,
    reduce: bool = True,
    impl: str | None = None,
    known: Known | None = None,
) -> Measure | None:
    """Visits every element of `weights` once.

    Args:
        weights: floating-point tensors of any strides, each of strength group `groups[i]`.
        mode: what to do besides reading; the gradient modes write or update `grads`.
        scale: factors on the strengths, read on the device.
        grads: one tensor of the weight's shape, dtype and device for each weight.
        reduce: whether the value is wanted.
        impl: "triton", "torch", or None for the best there is.
        known: what `recall` says of these weights, if that accepts `grads`.

    Raises:
        RuntimeError: impl="triton" where it cannot run.
    """
    accepted = known is not None
    known = known or recall(weights, groups)
    dense = weights if known else [w if is_dense(w) else w.contiguous() for w in weights]
    plan = known.plan if known else plan_for(dense, groups)
    if known is None and all(map(operator.is_, dense, weights)):
        known = remember(weights, groups, plan)
    staged = grads
    if grads is not None and not accepted and not (known and known.accepts(grads)):
        staged = [_stage(g, w, mode) for g, w in zip(grads, dense, strict=True)]
        if known and all(map(operator.is_, staged, grads)):
            known.accept(grads)
    value_dtype = plan.value_dtype if reduce else None
    measures: list[Measure | None] = []
    # All decided before the first write, so that an error leaves everything as it was.
    runs = [implementation(device, impl) for device in plan.shards]
    # Tensor subclasses that merely mark their tensors would mark the value too.
    with torch._C.DisableTorchFunctionSubclass():
        for run, (device, parts) in zip(runs, plan.shards.items(), strict=True):
            local = strengths.on(device), scale.on(device)
            measures.append(run(parts, mode, dense, staged, *local, plan.n_groups, value_dtype))
    if mode == Mode.PROX and dense is not weights:
        _unstage(dense, weights)
    if staged is not None and grads is not None and staged is not grads:
        _unstage(staged, grads)
    if value_dtype is None or len(measures) == 1:
        return measures[0]
    # From the float64 sums of all devices, so that nothing is rounded twice.
    first = next(iter(plan.shards))
    sums = torch.stack([m.sums.to(first) for m in measures if m is not None]).sum(0)
    return measure(sums, strengths.on(first), value_dtype)


def check_impl(impl: object) -> None:
    """Raises ValueError where `impl` names no implementation."""
    if impl not in (None, "triton", "torch"):
        raise ValueError(f'impl must be "triton", "torch" or None, got {impl!r}')


def implementation(device: torch.device, impl: str | None) -> Callable[..., Measure | None]:
    """The one place that decides between Triton and PyTorch.

    Raises:
        RuntimeError: "triton" asked for where it is missing or cannot run.
    """
    if impl == "torch" or (impl is None and device.type != "cuda"):
        return reference.sweep
    try:
        from fastreg import kernels
    except ImportError as error:
        if impl is None:
            return reference.sweep
        raise RuntimeError(
            'impl="triton" needs Triton, which is not installed; install it, or leave impl out'
        ) from error
    if device.type != "cuda" and not (device.type == "cpu" and kernels.INTERPRETED):
        raise RuntimeError(
            f'impl="triton" cannot run on {device.type} tensors; leave impl out, move the weights to a GPU, or set '
            "TRITON_INTERPRET=1 before fastreg is first used"
        )
    return kernels.sweep


def uses_triton(device: torch.device, impl: str | None) -> bool:
    """Whether `implementation` decides for Triton; raises as it does."""
    return implementation(device, impl) is not reference.sweep


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def check_writable(tensor: Tensor, what: str) -> None:
    """Raises before anything is written where `tensor`, called `what`, cannot be changed in place.

    Raises:
        ValueError: elements that share memory.
        RuntimeError: an inference tensor outside inference mode.
    """
    if not is_dense(tensor) and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise ValueError(f"{what} is expanded: its elements share memory; pass the tensor it views, or a clone()")
    if not counts_changes(tensor) and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} was made in inference mode, and can be changed only there")


def counts_changes(tensor: Tensor) -> bool:
    """False for inference tensors, of which a compiler that traces this has none."""
    return torch.compiler.is_compiling() or not tensor.is_inference()


def empty_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialised gradients in the memory order of their weights: one allocation per device and dtype."""
    spans: dict[tuple[torch.device, torch.dtype], int] = {}
    starts = []
    for w in weights:
        key = (w.device, w.dtype)
        starts.append(spans.get(key, 0))
        # Every gradient starts on a 16-byte boundary, which vector loads and stores need.
        spans[key] = starts[-1] + -(-w.numel() * w.element_size() // 16) * 16 // w.element_size()
    buffers = {key: torch.empty(size, dtype=key[1], device=key[0]) for key, size in spans.items()}
    return [
        buffers[w.device, w.dtype].as_strided(w.shape, _dense_stride(w), start)
        for w, start in zip(weights, starts, strict=True)
    ]


def _dense_stride(weight: Tensor) -> tuple[int, ...]:
    """The strides that `weight` has in a sweep: its own, or after a copy those of a contiguous tensor."""
    return weight.stride() if is_dense(weight) else torch.empty(weight.shape, device="meta").stride()


def _stage(target: Tensor, weight: Tensor, mode: Mode) -> Tensor:
    """`target` itself where it has the weight's memory order, else a copy that has."""
    if target.stride() == weight.stride() or target.numel() == 0 or (target.is_contiguous() and weight.is_contiguous()):
        return target
    staged = torch.empty_like(weight)
    return staged.copy_(target) if mode in (Mode.ACCUMULATE, Mode.RESCALE) else staged


def _unstage(staged: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(staged, targets, strict=True):
        if source is not target:
            target.copy_(source)
