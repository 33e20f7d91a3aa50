"""PyTorch's private names, except those of the autograd engine, which are in autograd/engine.py.

Each name is looked up and tried once, at import, so a call through it costs no more than the name itself. The decorator
`bound` replaces a function by the object that it returns. The function's docstring says what the private name promises,
and what replaces it if it is missing or does something else. Replacements give the same results, but are slower or more
cautious.
"""

import contextlib
import functools
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

T = TypeVar("T")


def bound(instead: Any) -> Callable[[Callable[[], Any]], Any]:
    """Replace the decorated function by the object that it returns, or by `instead` if it raises.

    It may also raise if fastreg is first imported inside a torch.func transform or under a TorchDispatchMode.
    """

    def bind(look_up: Callable[[], Any]) -> Any:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return look_up()
        except Exception:  # a private name may change in any way
            return instead

    return bind


def expect(is_as_promised: bool) -> None:
    """Raise RuntimeError if a private name does not do what it promises."""
    if not is_as_promised:
        raise RuntimeError("a private name of PyTorch does something else here")


def example(*values: float) -> Tensor:
    """Return a float32 vector in host memory, whatever the default device and dtype are."""
    return torch.tensor(values, dtype=torch.float32, device="cpu")


# Tensors and modules.


@bound(None)
def _TensorGuards() -> Any:  # noqa: N802
    """`TensorGuards(*tensors, ...).check(*others)` compares metadata in C++; torch.compile relies on it.

    It keeps no tensor alive. Missing: no cached layout matches, and every call creates a new one.
    """
    guards: Any = torch._C._dynamo.guards.TensorGuards
    a, b = example(1, 2, 3, 4), example(5, 6)
    check = guards(a, b, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    expect(check(a, b) is True and check(a.clone(), b.clone()) is True)
    others = [b, a[::2], a.view(2, 2), a.double(), a.clone().requires_grad_(), nn.Parameter(a, requires_grad=False)]
    expect(not any(check(other, b) for other in others))
    return guards


def snapshot(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function that tells whether other tensors have the metadata that `tensors` have now.

    It compares class, dtype, device, shape, strides and requires_grad, and keeps no tensor alive.
    """
    if _TensorGuards is None:
        return lambda *others: False
    return _TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # type: ignore[no-any-return]


@bound(lambda tensor: 0)
def version() -> Any:
    """`tensor._version` counts the in-place changes of a tensor's memory; autograd uses it to check saved tensors.

    It raises RuntimeError for inference tensors. Missing: 0, and `HAS_VERSIONS` is False. Weights then go through
    save_for_backward, which raises if one was changed, and kernels read the optimizer's counters at every step.
    """
    get = operator.attrgetter("_version")
    a = example(1)
    before = get(a)
    a.view(1).add_(1)
    expect(type(before) is int and get(a) == before + 1)
    torch.autograd.graph.increment_version(a)
    expect(get(a) == before + 2)
    return get


HAS_VERSIONS = isinstance(version, operator.attrgetter)


@bound(lambda tensor: tensor.numel() > 0 and tensor.data_ptr() == 0)
def is_zerotensor() -> Any:
    """`tensor._is_zerotensor()` detects zeros without memory, which forward-mode differentiation creates.

    Missing: the address 0 detects them.
    """
    is_zerotensor: Any = Tensor._is_zerotensor  # type: ignore[attr-defined]
    expect(is_zerotensor(example(0)) is False)
    return is_zerotensor


@bound(lambda tensor: "Batched")
def dispatch_keys() -> Any:
    """`torch._C._dispatch_keys(tensor)` lists "Batched..." under torch.autograd.grad(is_grads_batched=True).

    Missing: every upstream gradient is treated as batched, and the gradient is computed by expressions.
    """
    keys = str(torch._C._dispatch_keys(example(0)))
    expect("CPU" in keys and "Batched" not in keys)
    return torch._C._dispatch_keys


# The shard of a DTensor, as FSDP2 reads it. It is not tried here, because importing DTensor takes a second. Missing
# (AttributeError): DTensor.to_local(), which in some versions makes a new tensor that shares the memory.
local_tensor = operator.attrgetter("_local_tensor")


@bound(lambda tensor: False)
def is_alias() -> Any:
    """`torch._C._storage_Use_Count(address)` counts the holders of a storage. `tensor._is_view()` is False for aliases.

    An alias shares the memory of another tensor without a record in autograd: the results of detach() and `.data`, and
    the tensors of a state dict. PyTorch's CUDA graphs rely on the count. Missing: no tensor counts as an alias, so that
    nothing warns of detached weights.
    """
    count, is_view = torch._C._storage_Use_Count, Tensor._is_view  # type: ignore[attr-defined]

    def n_holders(tensor: Tensor) -> Any:
        return count(tensor.untyped_storage()._cdata)

    a = example(1, 2)
    alone = n_holders(a)

    def is_alias_of_another(tensor: Tensor) -> bool:
        return not is_view(tensor) and n_holders(tensor) > alone

    others = [a.detach(), a.data]
    expect(all(map(is_alias_of_another, others)) and not is_alias_of_another(a[1:]))
    del others
    expect(is_alias_of_another(a) is False)
    return is_alias_of_another


def is_state_dict(params: object) -> TypeGuard[Mapping[str, Any]]:
    """Return whether `params` is the state dict of a module, which has an attribute `_metadata`.

    Missing: it is taken for any other mapping.
    """
    return isinstance(params, Mapping) and hasattr(params, "_metadata")


class _Contents:
    """The current parameters or submodules of a module, read by public methods."""

    def __init__(self, module: nn.Module, named: Callable[[nn.Module], Iterable[tuple[str, Any]]]) -> None:
        self._module, self._named = module, named

    def __len__(self) -> int:
        return len(self.values())

    def values(self) -> list[Any]:
        return [each for _, each in self._named(self._module)]


def _contents_by_public_methods(modules: Sequence[nn.Module]) -> list[Any]:
    contents = []
    for module in modules:
        named_parameters = functools.partial(nn.Module.named_parameters, recurse=False, remove_duplicate=False)
        contents += [_Contents(module, named_parameters), _Contents(module, nn.Module.named_children)]
    return contents


@bound(_contents_by_public_methods)
def module_contents() -> Any:
    """`module._parameters` and `module._modules` are dicts of the current contents of each module in a list.

    Most libraries that replace parameters rely on them. Missing: public methods are called for each module.
    """

    # Not an attrgetter, which torch.compile cannot trace.
    def contents_of(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
        return [contents for module in modules for contents in (module._parameters, module._modules)]

    module, child = nn.Module(), nn.Module()
    parameters, modules = contents_of([module])
    module.register_parameter("p", parameter := nn.Parameter(example(1)))
    module.add_module("m", child)
    expect(parameters["p"] is parameter and modules["m"] is child)
    module.p = replaced = nn.Parameter(example(2))
    expect(list(parameters.values()) == [replaced] and list(modules.values()) == [child])
    return contents_of


def shown_by_fsdp(module: nn.Module) -> list[Tensor] | None:
    """Return the parameters that FSDP2 shows in place of the sharded ones of an `FSDPModule`; None if unknown.

    FSDP2 shows them between forward and backward, and has no public way to list them. Its own state dicts rely on the
    private names. Missing: None; every parameter that is not a DTensor is then treated as one of them.
    """
    owner: Any = module
    shown: list[Tensor] = []
    try:
        state = owner._get_fsdp_state()
        # Older versions have at most one group.
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for group in groups:
            if group is None or group.is_sharded:
                continue
            for param in group.fsdp_params:
                shown.append(param._unsharded_param)
                # Exists after the first forward pass with reshard_after_forward=<int>.
                resharded = getattr(param, "_sharded_post_forward_param", None)
                if resharded is not None:
                    shown.append(resharded)
    except (AttributeError, TypeError):
        return None
    return shown


# Modes and transforms.


@bound(contextlib.nullcontext)
def no_subclass() -> Any:
    """`torch._C.DisableTorchFunctionSubclass()` turns off `__torch_function__` of tensor subclasses.

    PyTorch's notes on extending it show it. Missing: a subclass that marks its tensors marks the penalty, too.
    """
    with torch._C.DisableTorchFunctionSubclass():
        pass
    return torch._C.DisableTorchFunctionSubclass


def _try_requires_grad() -> bool | None:
    try:
        torch.empty(0, device="cpu").requires_grad_(False)
    except RuntimeError:
        return True
    return None


@bound(_try_requires_grad)
def _transform() -> Any:
    """`torch._C._functorch.peek_interpreter_stack()` is None unless a torch.func transform is active.

    PyTorch's autograd Functions and custom operators rely on it. Missing: `requires_grad_` is called, which raises
    inside every transform.
    """
    peek = torch._C._functorch.peek_interpreter_stack
    expect(peek() is None)
    return peek


def _try_make_dual(module: Any) -> int:
    try:
        module.make_dual(example(0), example(0))
    except RuntimeError:
        return -1
    return 0


@bound(_try_make_dual)
def _dual_level() -> Any:
    """`torch.autograd.forward_ad._current_level` is negative unless forward-mode differentiation is active.

    Missing: `make_dual` is called, which raises outside forward mode.
    """
    level = operator.attrgetter("_current_level")
    expect(type(level(forward_ad)) is int and level(forward_ad) < 0)
    return level


def _get_proxy_mode(key: Any) -> Any:
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return None if module is None else module.get_proxy_mode()


@bound((_get_proxy_mode, None))
def _dispatch_mode() -> Any:
    """`torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)` is None unless make_fx traces.

    PyTorch's higher-order operators rely on it. Missing: `get_proxy_mode()`, if its module was imported.
    """
    get, proxy = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY
    expect(get(proxy) is None)
    return get, proxy


_get_dispatch_mode, _PROXY = _dispatch_mode


@bound(lambda: 1)
def _n_dispatch_modes() -> Any:
    """`torch._C._len_torch_dispatch_stack()` is the number of active TorchDispatchModes.

    Missing: one mode is always assumed, so no memory is kept between calls.
    """
    expect(type(torch._C._len_torch_dispatch_stack()) is int)
    return torch._C._len_torch_dispatch_stack


def is_transformed() -> bool:
    """Return whether a torch.func transform, forward-mode differentiation or make_fx is active."""
    if _transform() is not None or _dual_level(forward_ad) >= 0:
        return True
    return _get_dispatch_mode(_PROXY) is not None and not torch.compiler.is_compiling()


# torch.compile evaluates the function once, during tracing. torch.compiler.assume_constant_result does the same, but
# imports the compiler. Missing: torch.compile traces the function, and breaks the graph at the C functions in it.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_under_a_mode() -> bool:
    """Return whether a TorchDispatchMode or a torch.func transform is active. Neither may see cached tensors."""
    return _n_dispatch_modes() > 0 or _transform() is not None


# Operators.


def _add_each(targets: Sequence[Tensor], others: Any) -> None:
    each = others if isinstance(others, Sequence) else [others] * len(targets)
    for target, other in zip(targets, each, strict=True):
        target.add_(other)


@bound(_add_each)
def foreach_add_() -> Any:
    """`torch._foreach_add_(tensors, other)` adds one number to all, or a number or a tensor to each, in one call.

    torch.optim relies on it. Missing: one call per tensor.
    """
    a, b = example(1), example(2)
    for other in (1, [1.0, 2.0], [example(0.5), example(0.25)]):
        torch._foreach_add_([a, b], other)  # type: ignore[arg-type]
    expect(a.item() == 3.5 and b.item() == 5.25)
    return torch._foreach_add_


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


@bound(_copy_each)
def foreach_copy_() -> Any:
    """`torch._foreach_copy_(targets, sources)` copies each source to its target, of any dtype, in one call.

    torch.optim relies on it. Missing: one call per tensor.
    """
    a, b = example(0), example(0).double()
    torch._foreach_copy_([a, b], [example(1.5).half(), example(2.5)])
    expect(a.item() == 1.5 and b.item() == 2.5)
    return torch._foreach_copy_


@bound(None)
def fused_sgd_() -> Any:
    """`torch._fused_sgd_` makes steps of torch.optim.SGD(fused=True).

    With a buffer b it computes b = momentum * b + (1 - dampening) * grad and w -= lr * b. Missing: expressions.
    """
    w, buffer = example(1), example(1)
    torch._fused_sgd_(
        [w], [example(2)], [buffer], weight_decay=1.0, momentum=0.5, lr=1.0, dampening=0.5, nesterov=False,
        maximize=False, is_first_step=False, grad_scale=None,
    )  # fmt: skip
    expect(buffer.item() == 2 and w.item() == -1)
    return torch._fused_sgd_


def _check_fused_adam(step: Any, expected: float) -> Any:
    w, first, second = example(1), example(0), example(0)
    step(
        [w], [example(1)], [first], [second], [], [example(1)[0]], lr=0.5, beta1=0.5, beta2=0.75, weight_decay=0.5,
        eps=0.0, amsgrad=False, maximize=False, grad_scale=None,
    )  # fmt: skip
    expect(abs(w.item() - expected) < 1e-6)
    return step


@bound(None)
def fused_adam_() -> Any:
    """`torch._fused_adam_` makes steps of torch.optim.Adam(fused=True). Missing: expressions."""
    return _check_fused_adam(torch._fused_adam_, 0.5)


@bound(None)
def fused_adamw_() -> Any:
    """`torch._fused_adamw_` makes steps of torch.optim.AdamW(fused=True). Missing: expressions."""
    return _check_fused_adam(torch._fused_adamw_, 0.25)


HAS_FUSED_STEPS = None not in (fused_sgd_, fused_adam_, fused_adamw_)


# Optimizers.


def unscales_gradients(optimizer_class: type[T]) -> type[T]:
    """Decorate an optimizer class: GradScaler leaves unscaling and the check for infinities to its steps.

    `_step_supports_amp_scaling` requests this, as in torch.optim.Adam(fused=True). If GradScaler looks for another
    name, it does both itself, with one more pass over the gradients and a device synchronization.
    """
    optimizer_class._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return optimizer_class
