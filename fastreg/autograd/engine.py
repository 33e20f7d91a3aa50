"""May backward write .grad itself? All calls of the autograd engine's private interface are here.

What they promise, as PyTorch's own DDP and FSDP rely on it:

- `_execution_engine.queue_callback(f)` calls f once, in this thread, when the running backward pass has finished; what
  f queues itself runs after all that the pass has queued before.
- `torch._C._will_engine_execute_node(node)` tells whether the running pass will execute a node, and raises RuntimeError
  under torch.autograd.grad, which wants the gradients for itself.
- An AccumulateGrad node that only the graph holds has `_UNSHARED` references; its hooks get None (docs/threads.md).

Where one of them is missing, gradients are returned to autograd: slower, and the same numbers.
"""

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_HAS_DISTRIBUTED = torch.distributed.is_available()
_HAS_ENGINE_ENTRY_POINTS = hasattr(torch._C, "_will_engine_execute_node") and hasattr(
    torch.autograd.Variable._execution_engine, "queue_callback"
)
_HOOKS, _POST_HOOKS = map(operator.attrgetter, ("_backward_hooks", "_post_accumulate_grad_hooks"))


def apply(function: Any, *inputs: Any) -> Any:
    """`function.apply(*inputs)` in C++; the one in Python loops over all inputs, for torch.func only."""
    return super(torch.autograd.Function, function).apply(*inputs)


def note_hooks(function: Any) -> None:
    """Has the graph's nodes of an autograd Function note in `was_hooked` that a hook was put on them."""
    node_class = getattr(function, "_backward_cls", None)
    if node_class is not None:

        def register_hook(node: Any, hook: Any) -> Any:
            node.was_hooked = True
            return super(node_class, node).register_hook(hook)

        node_class.was_hooked = False
        node_class.register_hook = register_hook


def must_return_gradients(is_sharded: bool) -> bool:
    """Whether this is no place for backward passes that write gradients themselves, whatever the weights."""
    # DDP and its kin reduce gradients in hooks of C++ that nothing in Python shows; if ranks scale their losses
    # differently, only what passes through those hooks is averaged. Not so of DTensors: FSDP2 sets their .grad by
    # itself, on a stream that is safe to follow only when the backward pass is over.
    if not _HAS_ENGINE_ENTRY_POINTS or (not is_sharded and _HAS_DISTRIBUTED and torch.distributed.is_initialized()):
        return True
    return _is_watched()


def are_hooked(weights: Sequence[Tensor]) -> bool:
    """Whether hooks of the weights would see their gradients."""
    # One pass in C for each attribute is twice as fast as one loop in Python over the weights.
    return any(map(_HOOKS, weights)) or any(map(_POST_HOOKS, weights))


def only_accumulates(node: Any, n_weights: int) -> bool:
    """Whether the running pass does nothing with the last `n_weights` gradients of `node` but add each to its .grad."""
    if _is_watched():
        return False
    if getattr(node, "was_hooked", True):
        handle = node.register_hook(lambda inputs, outputs: None)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        if hooks:  # of others, who will see what the node returns
            return False
    nodes = [each for each, _ in node.next_functions[-n_weights:]]
    # Whoever holds an AccumulateGrad node does so to hook it; to ask all of them for their hooks takes too long.
    if set(map(type, nodes)) != {_ACCUMULATE_GRAD} or max(map(sys.getrefcount, nodes)) > _UNSHARED:
        return False
    try:
        return all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:  # torch.autograd.grad
        return False


def _is_watched() -> bool:
    """Whether anomaly mode or compiled autograd looks at what nodes return."""
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    return torch.is_anomaly_enabled() or bool(getattr(compiled_autograd, "compiled_autograd_enabled", False))


def run_after_backward(callback: Callable[[], None], device: torch.device, tensors: Sequence[object]) -> None:
    """Calls `callback` once the running backward pass has finished.

    It may run on another stream of `device` than this one, and waits there for what this one does to `tensors`.
    """
    producer: Any = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> None:
        consumer = torch.cuda.current_stream(device) if producer else None
        if consumer and consumer != producer:
            consumer.wait_stream(producer)
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    tensor.record_stream(consumer)
        callback()

    queue = torch.autograd.Variable._execution_engine.queue_callback
    # Queued from a callback, it comes after those that this backward pass still queues, such as FSDP2's last one.
    queue(functools.partial(queue, run))


with torch.inference_mode(False), torch.enable_grad():
    _GRAPH: Any = torch.zeros((), device="cpu", requires_grad=True).clone()
_ACCUMULATE_GRAD = type(_GRAPH.grad_fn.next_functions[0][0])
# As counted in `only_accumulates`: PyTorch versions differ in how many references are their own.
_UNSHARED = max(map(sys.getrefcount, [each for each, _ in _GRAPH.grad_fn.next_functions]))
