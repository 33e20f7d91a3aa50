"""What the optimizers of `fastreg.optim` share: their options, their state, and the way from `step` to the sweep."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastreg.core.checks import Impl, check_impl, check_tensors, warn_user
from fastreg.core.dtensor import any_dtensor
from fastreg.core.penalty import Strength, add_results
from fastreg.core.strengths import check_strength, checked, penalty_of_groups
from fastreg.core.torch_private import unscales_gradients
from fastreg.core.types import Mode, Request, Settings, Update, Want, Work
from fastreg.formulas.penalty import ElasticNetPenalty, Penalty
from fastreg.selection.params import check_keys
from fastreg.sweep.dispatch import is_traced_now
from fastreg.sweep.steps import apply_steps


class Kind(NamedTuple):
    """Parameters that make the same kind of step, in the order of the param groups."""

    mode: Mode
    names: list[str]
    params: list[Tensor]
    states: list[dict[str, Any]]
    rows: list[tuple[int, bool]]  # of each strength group: the param group, and whether it is a first step
    row_of: list[int | range]  # of each parameter: its strength group
    is_sharded: bool


class Plan(NamedTuple):
    """What was found of the parameters that have gradients, for as long as these and their states are the same."""

    params: list[Tensor]  # all
    has_grad: list[bool]
    options: list[Any]  # of each group, what decides the mode
    states: list[dict[str, Any]]  # all there are
    kinds: list[Kind]


@unscales_gradients
class Penalized(Optimizer):
    """A mixin before one of torch.optim's classes."""

    _plan: Plan | None = None
    _track = False
    _impl: Impl = None
    _tracked: list[Penalty | None]  # the last one, in a list: compiled code cannot set attributes of an optimizer

    def _penalize(self, l1: Strength, l2: Strength, prox: bool, track: bool, impl: Impl) -> None:
        """To be called when torch.optim's constructor is done."""
        check_impl(impl)
        if not isinstance(track, bool):
            raise TypeError(f"track must be True or False, got {track!r}")
        self._track, self._impl, self._tracked = track, impl, [None]
        self.defaults.update(
            l1=check_strength(l1, "l1"), l2=check_strength(l2, "l2"), prox=prox, fused=True, foreach=None
        )
        for i, group in enumerate(self.param_groups):
            self._complete(group, i)

    @property
    def last(self) -> Penalty | None:
        """The penalty of the weights before the last step, of those that had gradients; None unless it is tracked."""
        return self._tracked[0]

    @property
    def has_strengths(self) -> bool:
        """Whether any group has a strength that is not 0; tensors are not looked into."""
        return any(isinstance(g[name], Tensor) or g[name] != 0 for g in self.param_groups for name in ("l1", "l2"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; l1, l2 and prox are options of a group as lr is."""
        n = len(self.param_groups)
        if isinstance(param_group, dict):
            check_keys(param_group, n)
        super().add_param_group(param_group)
        if "l1" in self.defaults:
            try:
                self._complete(self.param_groups[n], n)
            except (TypeError, ValueError):
                del self.param_groups[n]
                raise

    def _complete(self, group: dict[str, Any], number: int) -> None:
        for name in ("l1", "l2", "prox"):
            group.setdefault(name, self.defaults[name])
        # There is one implementation. A checkpoint then says where torch.optim's class has to look for the steps.
        group["fused"], group["foreach"] = True, None
        self._settings(group, number, is_first=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's. Groups of a state without l1, l2 and prox get l1=0, l2=0 and prox=False, with a warning."""
        had = self.has_strengths
        super().load_state_dict(state_dict)
        if had and not any("l1" in group for group in state_dict["param_groups"]):
            warn_user(
                "the loaded state has no l1 and l2, as one of torch.optim's class; all groups now have l1=0, l2=0: "
                'assign group["l1"] and group["l2"] of optimizer.param_groups anew'
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_track": self._track, "_impl": self._impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._tracked = None, [None]
        for group in self.param_groups:
            group.setdefault("l1", 0.0)
            group.setdefault("l2", 0.0)
            group.setdefault("prox", False)
            group["fused"], group["foreach"] = True, None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step, with the penalty in it. `closure` is called before it, and its result returned.

        Raises RuntimeError for sparse gradients, TypeError for gradients or states that are not like their weights and
        ValueError for options that do not make sense, before anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        works, new_states = self._works()
        measured = apply_steps(works)
        if new_states:
            # States of a step that was not made, because of infinite gradients, are no states. Once, this waits.
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or not found_inf.item():
                for p, state in new_states:
                    self.state[p] = state
        if self._track:
            results = [work.penalty.result(each) for (work, _), each in zip(works, measured, strict=True)]
            if results:
                self._tracked[0] = add_results(results)
        return loss

    def _works(self) -> tuple[list[tuple[Work, Request]], list[tuple[Tensor, dict[str, Any]]]]:
        """The steps to make, and the states of parameters that make their first."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        has_grad = [grad is not None for grad in grads]
        options = [(len(group["params"]), self._mode(group)) for group in self.param_groups]
        plan = self._plan
        new_states: list[tuple[Tensor, dict[str, Any]]] = []
        if (
            plan is None
            or torch.compiler.is_compiling()
            or has_grad != plan.has_grad
            or options != plan.options
            or not all(map(operator.is_, params, plan.params))
            or len(self.state) != len(plan.states)
            or not all(map(operator.is_, self.state.values(), plan.states))
        ):
            kinds, new_states = self._new_kinds()
            # After a first step other settings hold.
            plan = Plan(params, has_grad, options, list(self.state.values()), kinds)
            self._plan = None if new_states or torch.compiler.is_compiling() else plan
        if len(plan.kinds) == 1 and all(has_grad):
            return [self._work_of(plan.kinds[0], grads)], new_states
        return [self._work_of(kind, [p.grad for p in kind.params]) for kind in plan.kinds], new_states

    def _new_kinds(self) -> tuple[list[Kind], list[tuple[Tensor, dict[str, Any]]]]:
        """The parameters that have gradients, with their states, and the new ones of those that had none."""
        stepped = [
            (group["param_names"][i] if "param_names" in group else f"groups[{number}].params[{i}]", p, number)
            for number, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        check_tensors([name for name, _, _ in stepped], [p for _, p, _ in stepped])
        kinds: dict[Mode, Kind] = {}
        new_states: list[tuple[Tensor, dict[str, Any]]] = []
        is_sharded = any_dtensor([p for _, p, _ in stepped])
        for name, p, number in stepped:
            mode = self._mode(self.param_groups[number])
            kind = kinds.setdefault(mode, Kind(mode, [], [], [], [], [], is_sharded))
            state = self._state_of(p, mode)
            old = self.state.get(p, {})
            if state is not old and state:
                new_states.append((p, state))
            row = number, "momentum_buffer" in state and not isinstance(old.get("momentum_buffer"), Tensor)
            if row not in kind.rows:
                kind.rows.append(row)
            kind.names.append(name)
            kind.params.append(p)
            kind.states.append(state)
            kind.row_of.append(kind.rows.index(row))
        return list(kinds.values()), new_states

    def _work_of(self, kind: Kind, grads: list[Any]) -> tuple[Work, Request]:
        groups = [self.param_groups[i] for i, _ in kind.rows]
        settings = [self._settings(group, i, is_first) for group, (i, is_first) in zip(groups, kind.rows, strict=True)]
        penalty = ElasticNetPenalty((0.0, 0.0))
        if self._track:
            rows = [checked(ElasticNetPenalty, group["l1"], group["l2"]).strengths for group in groups]
            penalty = penalty_of_groups(ElasticNetPenalty, rows, kind.params[0].device)
        n, impl, is_traced = len(groups), self._impl, is_traced_now()
        work = Work(kind.names, kind.params, kind.row_of, n, penalty, impl, kind.is_sharded, is_traced)
        of_names = {name: [state[name] for state in kind.states] for name in self._state_names(kind.mode)}
        steps = of_names.pop("step", None)
        first, second, third = (*of_names.values(), None, None, None)[:3]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        step = Update(settings, (first, second, third), steps, scale, found_inf)
        return work, Request(kind.mode, Want.TERMS if self._track else Want.NOTHING, grads, step=step)

    def _state_of(self, p: Tensor, mode: Mode) -> dict[str, Any]:
        """The state of `p` if it has all that the mode needs, else a new one, with zeros as torch.optim begins."""
        names = self._state_names(mode)
        old: dict[str, Any] = self.state.get(p, {})
        if all(isinstance(old.get(name), Tensor) for name in names) and _is_counter(old.get("step"), p):
            return old
        state = dict(old)
        with torch.inference_mode(False):
            for name in names:
                if name == "step":
                    step = old.get(name, 0.0)
                    state[name] = torch.as_tensor(step, dtype=torch.float32).to(p.device, copy=True)
                elif not isinstance(old.get(name), Tensor):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    # What differs from one optimizer to another.

    def _mode(self, group: dict[str, Any]) -> Mode:
        raise NotImplementedError

    def _state_names(self, mode: Mode) -> tuple[str, ...]:
        """The names in the state, in the order in which a sweep has them."""
        raise NotImplementedError

    def _settings(self, group: dict[str, Any], number: int, is_first: bool) -> Settings:
        """The numbers of a group as they are now; raises TypeError or ValueError for those that make no sense."""
        raise NotImplementedError


def _is_counter(step: object, p: Tensor) -> bool:
    """Whether kernels can count steps in it; what has no counter needs none."""
    if step is None:
        return True
    return isinstance(step, Tensor) and step.device == p.device and step.dtype == torch.float32


def learning_rate(group: dict[str, Any], number: int) -> Strength:
    """The lr of a group; ValueError for one that is negative, NaN or infinite."""
    lr = group["lr"]
    return lr.reshape(()) if isinstance(lr, Tensor) else check_strength(lr, f"lr of param group {number}")


def strengths_of(
    group: dict[str, Any], number: int, factor: float = 1.0
) -> tuple[Strength, Strength, Strength, Strength]:
    """l1 and l2 for the gradient, and times `factor` for the proximal step: one pair of both is 0."""
    if group.get("maximize"):
        raise ValueError("maximize=True would reward the penalty; minimize -loss instead")
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not supported: the step is one operation without a derivative")
    l1, l2 = (check_strength(group[name], f"{name} of param group {number}") for name in ("l1", "l2"))
    if not isinstance(group["prox"], bool):
        raise TypeError(f"prox of param group {number} must be True or False, got {group['prox']!r}")
    return (0.0, 0.0, l1 * factor, l2 * factor) if group["prox"] else (l1, l2, 0.0, 0.0)


def _lr(group: dict[str, Any], number: int) -> Strength:
    lr = group.get("lr")
    if lr is None:
        raise ValueError(f"param group {number} of the optimizer has no lr, by which a proximal step would shrink")
    if isinstance(lr, Tensor):
        # In host memory there is nothing to wait for.
        lr = lr.item() if lr.device.type == "cpu" else lr.reshape(())
    return check_strength(lr, f"lr of param group {number}")
