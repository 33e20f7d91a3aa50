"""Decide whether backward may write .grad itself, by PyTorch's private names for the engine and the graph's nodes.

Each name is looked up and tried at import, as in core/torch_private.py. Where a name is missing or does something
else, backward returns gradients to autograd: slower, with the same results.
"""

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.core.torch_private import HAS_VERSIONS, bound, example, expect

_HAS_DISTRIBUTED = torch.distributed.is_available()


def _apply_in_python(function: Any, *inputs: Any) -> Any:
    return function.apply(*inputs)


@bound(_apply_in_python)
def apply() -> Any:
    """`apply(function, *inputs)` is `function.apply(*inputs)` through the C++ method that Function.apply calls.

    Function.apply itself loops over all inputs in Python, for torch.func only. Missing: Function.apply.
    """

    def apply_in_c(function: Any, *inputs: Any) -> Any:
        return super(torch.autograd.Function, function).apply(*inputs)

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> Tensor:
            return 2 * upstream

    doubled = apply_in_c(Double, example(3).requires_grad_())
    expect(doubled.item() == 6 and isinstance(doubled.grad_fn, torch.autograd.graph.Node))
    return apply_in_c


def note_hooks(function: Any) -> None:
    """Make the graph's nodes of an autograd Function set `was_hooked` when a hook is registered on them.

    `_backward_cls` is the class of these nodes. Missing: `only_accumulates` asks each node for its hooks.
    """
    try:
        node_class = function._backward_cls

        def register_hook(node: Any, hook: Any) -> Any:
            node.was_hooked = True
            return super(node_class, node).register_hook(hook)

        expect(issubclass(node_class, torch.autograd.function.BackwardCFunction))
        node_class.was_hooked = False
        node_class.register_hook = register_hook
    except Exception:  # a private name may change in any way
        return


def _look_up_hooks(name: str, register: Callable[[Tensor, Any], Any]) -> Any:
    get = operator.attrgetter(name)
    a = example(1).requires_grad_()
    expect(not get(a))
    register(a, lambda grad: None)
    expect(bool(get(a)))
    return get


@bound(lambda tensor: True)
def _hooks() -> Any:
    """`tensor._backward_hooks` holds the hooks of Tensor.register_hook. Missing: every weight counts as hooked."""
    return _look_up_hooks("_backward_hooks", Tensor.register_hook)


@bound(lambda tensor: True)
def _post_hooks() -> Any:
    """`tensor._post_accumulate_grad_hooks` holds the hooks of register_post_accumulate_grad_hook.

    Missing: every weight counts as hooked.
    """
    return _look_up_hooks("_post_accumulate_grad_hooks", Tensor.register_post_accumulate_grad_hook)


def _expect_refusal(function: Callable[[Any], Any], argument: Any) -> None:
    """Check that `function` takes `argument`. A backward pass would start the engine's threads, so run none."""
    try:
        function(argument)
    except RuntimeError:  # expected outside of a backward pass
        return


@bound(None)
def _queue_callback() -> Any:
    """`_execution_engine.queue_callback(f)` calls f once, in this thread, when the running backward pass has finished.

    A callback that f queues runs after all callbacks that the pass has queued. DDP and FSDP2 rely on this. Missing:
    backward returns gradients.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback  # type: ignore[attr-defined]
    _expect_refusal(queue, lambda: None)
    return queue


@bound(None)
def _will_execute() -> Any:
    """`torch._C._will_engine_execute_node(node)` tells whether the running backward pass will execute a node.

    It raises RuntimeError under torch.autograd.grad, which returns gradients to its caller. PyTorch's multi-grad hooks
    rely on it. Missing: backward returns gradients.
    """
    _expect_refusal(torch._C._will_engine_execute_node, example(1).requires_grad_().clone().grad_fn)
    return torch._C._will_engine_execute_node


_CAN_WRITE_GRADIENTS = HAS_VERSIONS and None not in (_queue_callback, _will_execute)


def must_return_gradients(is_sharded: bool) -> bool:
    """Return whether backward passes must return gradients here, whatever the weights are."""
    # DDP averages gradients in C++ hooks that Python cannot see, and a gradient that is written into .grad bypasses
    # them. DTensors have no such hooks: FSDP2 sets their .grad itself, on a stream that is safe to follow only after
    # the backward pass.
    if not _CAN_WRITE_GRADIENTS or (not is_sharded and _HAS_DISTRIBUTED and torch.distributed.is_initialized()):
        return True
    return _is_watched()


def are_hooked(weights: Sequence[Tensor]) -> bool:
    """Return whether any weight has a hook that would see its gradient."""
    # One pass in C per attribute is twice as fast as one loop in Python over the weights.
    return any(map(_hooks, weights)) or any(map(_post_hooks, weights))


def only_accumulates(node: Any, n_weights: int) -> bool:
    """Return whether the running backward pass only adds the last `n_weights` gradients of `node` to .grad."""
    if _is_watched():
        return False
    try:
        if getattr(node, "was_hooked", True):
            handle = node.register_hook(lambda inputs, outputs: None)
            hooks = handle.hooks_dict_ref()
            handle.remove()
            if hooks:  # these would see the returned gradients
                return False
        nodes = [each for each, _ in node.next_functions[-n_weights:]]
        # A reference to an AccumulateGrad node from elsewhere suggests a hook. Asking every node for hooks is too slow.
        if set(map(type, nodes)) != {_ACCUMULATE_GRAD} or max(map(sys.getrefcount, nodes)) > _UNSHARED:
            return False
        return all(map(_will_execute, nodes))
    except (RuntimeError, AttributeError):  # under torch.autograd.grad, or where a name is missing
        return False


def _is_watched() -> bool:
    """Return whether anomaly mode or compiled autograd inspects the gradients that nodes return.

    `torch._dynamo.compiled_autograd.compiled_autograd_enabled` tells whether compiled autograd is active. Missing: it
    counts as active once its module is imported.
    """
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    is_compiled = compiled_autograd is not None and getattr(compiled_autograd, "compiled_autograd_enabled", True)
    return torch.is_anomaly_enabled() or bool(is_compiled)


def run_after_backward(callback: Callable[[], None], device: torch.device, tensors: Sequence[object]) -> None:
    """Call `callback` when the running backward pass has finished.

    If the callback runs on another stream of `device`, that stream first waits until `tensors` are computed.
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

    # A callback queued by a callback runs after all that this backward pass still queues, such as FSDP2's last one.
    _queue_callback(functools.partial(_queue_callback, run))


with torch.inference_mode(False), torch.enable_grad():
    _GRAPH: Any = torch.zeros((), device="cpu", requires_grad=True).clone()
# Without a reference from elsewhere, hooks of an AccumulateGrad node are not noticed, and get None (docs/threads.md).
_ACCUMULATE_GRAD = type(_GRAPH.grad_fn.next_functions[0][0])
# References to a node that only the graph holds, counted as in `only_accumulates`: PyTorch versions hold more or fewer.
_UNSHARED = max(map(sys.getrefcount, [each for each, _ in _GRAPH.grad_fn.next_functions]))
