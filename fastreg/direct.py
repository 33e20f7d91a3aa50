"""May backward write .grad itself? All calls of the autograd engine's private interface are here.

What they promise, as PyTorch's own DDP and FSDP rely on it:

- `_execution_engine.queue_callback(f)` calls f once, in this thread, when the running backward pass has finished; what
  f queues itself runs after all that the pass has queued before.
- `torch._C._will_engine_execute_node(node)` tells whether the running pass will execute a node, and raises RuntimeError
  under torch.autograd.grad, which wants the gradients for itself.
- An AccumulateGrad node that only the graph holds has `_UNSHARED` references; whoever hooks one has to hold it.

Where one of them is missing, gradients are returned to autograd: slower, and the same numbers.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.dtensor import any_dtensor

_HAS_GRAD_DTYPE = hasattr(Tensor, "grad_dtype")
_HAS_ENGINE_ENTRY_POINTS = hasattr(torch._C, "_will_engine_execute_node") and hasattr(
    torch.autograd.Variable._execution_engine, "queue_callback"
)


def must_return_gradient(weights: Sequence[Tensor]) -> bool:
    """Whether anybody but .grad would see these weights' gradients, as far as that is known before backward runs."""
    # DDP and its kin reduce gradients in hooks of C++ that nothing in Python shows; if ranks scale their losses
    # differently, only what passes through those hooks is averaged. Not so of DTensors: FSDP2 sets their .grad by
    # itself, on a stream that is safe to follow only when the backward pass is over.
    if torch.distributed.is_available() and torch.distributed.is_initialized() and not any_dtensor(weights):
        return True
    if torch.is_anomaly_enabled() or not _HAS_ENGINE_ENTRY_POINTS or _compiled_autograd():
        return True
    # A pass for each question takes half the time of asking each weight all of them.
    return (
        not all([w.is_leaf for w in weights])
        or any([w._backward_hooks for w in weights])  # type: ignore[attr-defined]
        or any([w._post_accumulate_grad_hooks for w in weights])  # type: ignore[attr-defined]
        or (_HAS_GRAD_DTYPE and [w.grad_dtype for w in weights] != [w.dtype for w in weights])  # type: ignore[attr-defined]
    )


def positions_to_write(node: Any, weights: Sequence[Tensor]) -> list[int] | None:
    """The positions of the weights whose gradient the running pass would only add to .grad, for their `node`.

    None where that is not so, or not known: the gradients must then be returned.
    """
    if must_return_gradient(weights) or _is_hooked(node):
        return None
    nodes = node.next_functions[-len(weights) :]
    # Whoever holds an AccumulateGrad node does so to hook it, and asking all of them for their hooks takes too long.
    if max(_references(nodes)) > _UNSHARED:
        return None
    try:
        return [i for i, (each, _) in enumerate(nodes) if each and torch._C._will_engine_execute_node(each)]
    except RuntimeError:  # torch.autograd.grad
        return None


def run_after_backward(callback: Callable[[], None], device: torch.device, tensors: Sequence[object]) -> None:
    """Calls `callback` once the running backward pass has finished.

    It may run on another stream of `device` than this one, and waits there for what this one does to `tensors`.
    """
    follow = _stream_follower(device, tensors)

    def run() -> None:
        follow()
        callback()

    queue = torch.autograd.Variable._execution_engine.queue_callback
    # Queued from a callback, it comes after those that this backward pass still queues, such as FSDP2's last one.
    queue(lambda: queue(run))


def _stream_follower(device: torch.device, tensors: Sequence[object]) -> Callable[[], None]:
    if device.type != "cuda":
        return lambda: None
    producer = torch.cuda.current_stream(device)

    def follow() -> None:
        consumer = torch.cuda.current_stream(device)
        if consumer != producer:
            consumer.wait_stream(producer)
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    tensor.record_stream(consumer)

    return follow


def _references(edges: Any) -> list[int]:
    """How often the node of each edge is referenced, as seen from here."""
    return [sys.getrefcount(node) for node, _ in edges]


@torch.inference_mode(False)
@torch.enable_grad()
def _references_of_an_unshared_node() -> int:
    graph: Any = torch.zeros((), device="cpu", requires_grad=True).clone()
    return max(_references(graph.grad_fn.next_functions))


# PyTorch versions differ in how many references are their own.
_UNSHARED = _references_of_an_unshared_node()


def _is_hooked(node: Any) -> bool:
    """Whether hooks registered on `node` will see the gradients that it returns."""
    handle = node.register_hook(lambda inputs, outputs: None)
    hooks = handle.hooks_dict_ref()
    handle.remove()
    return bool(hooks)


def _compiled_autograd() -> bool:
    module = sys.modules.get("torch._dynamo.compiled_autograd")
    return bool(getattr(module, "compiled_autograd_enabled", False))
