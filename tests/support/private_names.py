"""Results of the library where a private name of PyTorch is missing or does something else.

    python -m tests.support.private_names OUT

For each name and each way of breaking it, a fork of this process breaks the name, imports the library and runs the
cases. OUT is a pickle of results by (name, way), with those of unbroken PyTorch under (None, "").
"""

import contextlib
import importlib
import os
import pickle
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # for torch.optim, too, which imports it at its first use
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

WAYS = ("missing", "changed")
L1, L2 = 0.3, 0.7


def weights(*dtypes: torch.dtype) -> list[Tensor]:
    """A large weight and two small ones of each dtype, the second with gaps."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(20_011,), (3, 8), (7,)]
    found = [torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes for shape in shapes]
    return [(w[:, ::2] if w.ndim == 2 else w).detach().requires_grad_() for w in found]


def upstream_of(ws: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(w.shape, generator=generator).to(w.dtype) for w in ws]


def all_dtypes() -> list[Tensor]:
    return weights(torch.float32, torch.float16, torch.float64)


def backward() -> list[Any]:
    """Into .grad twice, through one graph."""
    import fastreg

    ws = all_dtypes()
    penalty = fastreg.elastic_penalty(ws, L1, L2)
    (2 * penalty).backward(retain_graph=True)
    penalty.backward()
    return [penalty, *(w.grad for w in ws)]


def derivatives_for_autograd() -> list[Any]:
    """By torch.autograd.grad, for one upstream gradient and for three at once, and those of the strengths."""
    import fastreg

    ws = weights(torch.float32)
    penalty = fastreg.elastic_penalty(ws, L1, L2)
    many = torch.autograd.grad(penalty, ws, torch.tensor([1.0, 2.0, 0.5]), retain_graph=True, is_grads_batched=True)
    strengths = [torch.tensor(s, requires_grad=True) for s in (L1, L2)]
    return [
        *many,
        *torch.autograd.grad(penalty, ws),
        *torch.autograd.grad(fastreg.elastic_penalty(ws, *strengths), strengths),
    ]


def hooks() -> list[Any]:
    import fastreg

    ws, seen = weights(torch.float32), []
    ws[0].register_hook(lambda grad: 3 * grad)
    ws[1].register_post_accumulate_grad_hook(lambda w: seen.append(w.grad.clone()))  # type: ignore[union-attr]
    fastreg.elastic_penalty(ws, L1, L2).backward()
    penalty = fastreg.elastic_penalty(ws, L1, L2)
    assert penalty.grad_fn is not None
    penalty.grad_fn.register_hook(lambda inputs, outputs: seen.extend(g.clone() for g in inputs if g is not None))
    penalty.backward()
    return [*seen, *(w.grad for w in ws)]


def change_in_place() -> list[Any]:
    """Raises RuntimeError from backward, also where the new values are the old ones."""
    import fastreg

    raised = []
    for change in (lambda w: w.mul_(2), lambda w: w.mul_(1), lambda w: setattr(w, "data", w.data.clone())):
        ws = weights(torch.float32)
        penalty = fastreg.elastic_penalty(ws, L1, L2)
        with torch.no_grad():
            change(ws[0])
        try:
            penalty.backward()
            raised.append(False)
        except RuntimeError as error:
            raised.append("modified" in str(error))
    return raised


def into_memory() -> list[Any]:
    import fastreg

    ws = all_dtypes()
    for w, grad in zip(ws[::2], upstream_of(ws[::2]), strict=True):
        w.grad = grad
    added = fastreg.add_elastic_grad_(ws, L1, L2)
    fastreg.elastic_prox_(ws, L1, L2, lr=0.1)
    zeros = torch._efficientzerotensor((5,))
    with torch.no_grad():
        value = fastreg.elastic_penalty([torch.ones(5), zeros], L1, L2)
    return [*added, *ws, *(w.grad for w in ws), value]


def kept_module() -> list[Any]:
    """Its parameters and modules are replaced, and one is frozen."""
    import fastreg

    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.PReLU())
    with torch.no_grad():
        for number, p in enumerate(net.parameters()):
            p.fill_(number + 0.5)
    reg = fastreg.ElasticNet(net, L1, L2)
    values = [reg(), fastreg.elastic_penalty(net, L1, L2, exclude=nn.PReLU)]
    net[0].weight = nn.Parameter(torch.full((2, 3), 7.0))
    values += [reg(), fastreg.elastic_penalty(net, L1, L2)]
    net[1] = nn.Identity()
    values += [reg(), fastreg.elastic_penalty(net, L1, L2)]
    net[0].bias.requires_grad_(False)
    return [*values, reg(), fastreg.elastic_penalty(net, L1, L2, include=nn.Linear)]


def attached() -> list[Any]:
    import fastreg

    results: list[Any] = []
    for mode in ("grad", "prox"):
        for optimizer_class in (torch.optim.SGD, torch.optim.Adam):
            ws = weights(torch.float32)
            optimizer = optimizer_class(ws, lr=0.01)
            reg = fastreg.ElasticNet(ws, L1, L2)
            reg.attach(optimizer, mode)
            for _ in range(3):
                for w, grad in zip(ws, upstream_of(ws), strict=True):
                    w.grad = grad
                optimizer.step()
            results += [*ws, *(reg.last or ())]
    return results


def optimizers() -> list[Any]:
    import fastreg

    results: list[Any] = []
    for optimizer_class, options in (
        (fastreg.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (fastreg.optim.SGD, {"prox": True}),
        (fastreg.optim.Adam, {"amsgrad": True}),
        (fastreg.optim.AdamW, {"prox": True}),
    ):
        ws = weights(torch.float32, torch.float64)
        optimizer: Any = optimizer_class(ws, lr=0.01, l1=0.03, l2=0.02, track=True, **options)  # type: ignore[arg-type]
        for _ in range(3):
            for w, grad in zip(ws, upstream_of(ws), strict=True):
                w.grad = grad
            optimizer.step()
        results += [*ws, *(optimizer.last or ())]
    return results


def scaled_steps() -> list[Any]:
    """Under GradScaler, the second one with an infinite gradient."""
    import fastreg

    ws = weights(torch.float32)
    optimizer = fastreg.optim.SGD(ws, lr=0.1, momentum=0.9, l1=0.03, l2=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        loss = torch.stack([(w * grad).sum() for w, grad in zip(ws, upstream_of(ws), strict=True)]).sum()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    return ws


def transforms() -> list[Any]:
    """torch.func's, forward-mode differentiation and make_fx, also of a value without a graph."""
    import fastreg

    w = weights(torch.float32)[2].detach()

    def penalty(w: Tensor) -> Tensor:
        return fastreg.elastic_penalty([w], L1, L2)

    batch = torch.stack([w, 2 * w])
    with forward_ad.dual_level(), torch.no_grad():
        tangent = forward_ad.unpack_dual(penalty(forward_ad.make_dual(w, torch.ones_like(w)))).tangent
    graph = make_fx(penalty)(w)
    return [
        torch.func.grad(penalty)(w),
        torch.func.vmap(penalty)(batch),
        torch.func.hessian(penalty)(w),
        tangent,
        graph(2 * w),
    ]


CASES: tuple[Callable[[], list[Any]], ...] = (
    backward,
    derivatives_for_autograd,
    hooks,
    change_in_place,
    into_memory,
    kept_module,
    attached,
    optimizers,
    scaled_steps,
    transforms,
)


def run_cases() -> dict[str, list[Any]]:
    results = {}
    for case in CASES:
        found = case()
        results[case.__name__] = [x.detach().clone().numpy() if isinstance(x, Tensor) else x for x in found]
    return results


# Breaks a name in one of the ways. If PyTorch needs the name itself, it returns a function that mends it, which is
# called after the library was imported.
Break = Callable[[str], Callable[[], None] | None]


def of_module(owner: Any, name: str, *, is_mended: bool = False) -> Break:
    """A name in a module. Changed, it is a function of another argument."""

    def break_it(way: str) -> Callable[[], None] | None:
        original = getattr(owner, name)
        delattr(owner, name)
        if way == "changed":
            setattr(owner, name, lambda *, other: None)
        return (lambda: setattr(owner, name, original)) if is_mended else None

    return break_it


def of_tensors(name: str, *, owner: Any = Tensor, is_mended: bool = False) -> Break:
    """An attribute of every tensor, or of the instances of another class."""

    def get(tensor: Tensor) -> Any:
        raise AttributeError(name)

    def break_it(way: str) -> Callable[[], None] | None:
        setattr(owner, name, property(get if way == "missing" else lambda tensor: "something else"))
        return (lambda: delattr(owner, name)) if is_mended else None

    return break_it


def while_importing(owner: type, *names: str, changed: Any) -> Break:
    """Attributes of the instances of a class, which PyTorch needs itself; broken while the library is imported."""

    def break_it(way: str) -> Callable[[], None]:
        get = owner.__getattribute__

        def broken(instance: Any, name: str) -> Any:
            if name not in names:
                return get(instance, name)
            if way == "missing":
                raise AttributeError(name)
            return changed(get(instance, name))

        owner.__getattribute__ = broken  # type: ignore[assignment]
        return lambda: setattr(owner, "__getattribute__", get)

    return break_it


def of_engine(way: str) -> None:
    holder: Any = torch.autograd.Variable
    callbacks = {"queue_callback": lambda callback, *, other: None} if way == "changed" else {}
    others = {name: getattr(holder._execution_engine, name) for name in ("run_backward", "is_checkpoint_valid")}
    holder._execution_engine = types.SimpleNamespace(**others, **callbacks)


def of_functions(way: str) -> None:
    """The method in C++ that the Python method Function.apply calls."""
    original = torch.autograd.Function

    class Broken:
        def __get__(self, instance: Any, owner: Any) -> Any:
            if way == "missing":
                raise AttributeError("apply")
            return lambda *, inputs: None

    class Hiding(original):  # type: ignore[misc, valid-type]
        apply = Broken()

    class Function(Hiding):
        apply = classmethod(original.apply.__func__)  # type: ignore[attr-defined]

    torch.autograd.Function = Function  # type: ignore[misc]


def of_grad_scaler(way: str) -> Callable[[], None]:
    """GradScaler looks for a name that the library does not set."""

    def after_import() -> None:
        from fastreg.optim.base import Penalized

        del Penalized._step_supports_amp_scaling  # type: ignore[attr-defined]

    return after_import


BREAKS: dict[str, Break] = {
    "TensorGuards": of_module(torch._C._dynamo.guards, "TensorGuards"),
    "_version": of_tensors("_version"),
    "_is_zerotensor": of_tensors("_is_zerotensor"),
    "_dispatch_keys": of_module(torch._C, "_dispatch_keys"),
    "_storage_Use_Count": of_module(torch._C, "_storage_Use_Count"),
    "_cdata": of_tensors("_cdata", owner=torch.UntypedStorage, is_mended=True),
    "_is_view": of_tensors("_is_view", is_mended=True),
    "_parameters": while_importing(nn.Module, "_parameters", changed=dict),
    "_modules": while_importing(nn.Module, "_modules", changed=dict),
    "DisableTorchFunctionSubclass": of_module(torch._C, "DisableTorchFunctionSubclass", is_mended=True),
    "peek_interpreter_stack": of_module(torch._C._functorch, "peek_interpreter_stack"),
    "_current_level": of_module(forward_ad, "_current_level", is_mended=True),
    "_get_dispatch_mode": of_module(torch._C, "_get_dispatch_mode", is_mended=True),
    "_TorchDispatchModeKey": of_module(torch._C, "_TorchDispatchModeKey", is_mended=True),
    "_len_torch_dispatch_stack": of_module(torch._C, "_len_torch_dispatch_stack"),
    "_foreach_add_": of_module(torch, "_foreach_add_"),
    "_foreach_copy_": of_module(torch, "_foreach_copy_"),
    "_fused_sgd_": of_module(torch, "_fused_sgd_"),
    "_fused_adam_": of_module(torch, "_fused_adam_"),
    "_fused_adamw_": of_module(torch, "_fused_adamw_"),
    "_step_supports_amp_scaling": of_grad_scaler,
    "apply": of_functions,
    "_backward_cls": while_importing(type(torch.autograd.Function), "_backward_cls", changed=lambda found: int),
    "_backward_hooks": of_tensors("_backward_hooks", is_mended=True),
    "_post_accumulate_grad_hooks": of_tensors("_post_accumulate_grad_hooks", is_mended=True),
    "queue_callback": of_engine,
    "_will_engine_execute_node": of_module(torch._C, "_will_engine_execute_node"),
    "compiled_autograd_enabled": of_module(torch._dynamo.compiled_autograd, "compiled_autograd_enabled"),
}


def run_broken(name: str | None, way: str) -> Any:
    mend = None if name is None else BREAKS[name](way)
    importlib.import_module("fastreg")
    if mend is not None:
        mend()
    return run_cases()


def in_a_copy(name: str | None, way: str, file: Path) -> Any:
    """Return the results of a fork of this process, or its traceback as a string."""
    child = os.fork()
    if child == 0:
        try:
            results = run_broken(name, way)
        except BaseException:
            results = traceback.format_exc()
        with contextlib.suppress(BaseException):
            file.write_bytes(pickle.dumps(results))
        os._exit(0)
    os.waitpid(child, 0)
    return pickle.loads(file.read_bytes())


def main(out: str) -> None:
    torch.set_num_threads(1)
    # PyTorch imports what the cases need at its first use, which would be in every fork.
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
    make_fx(torch.sin)(torch.ones(1))
    assert "fastreg" not in sys.modules, "a name can only be broken before the library is imported"
    cases = [(None, ""), *((name, way) for name in BREAKS for way in WAYS)]
    results = {each: in_a_copy(*each, Path(f"{out}.part")) for each in cases}
    Path(out).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
