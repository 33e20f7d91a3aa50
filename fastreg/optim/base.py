"""What the optimizers of `fastreg.optim` share: options, states, and the way from `step` to the sweep."""

import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastreg.core.checks import Impl, check_impl, check_overlap, check_tensors, warn_user
from fastreg.core.dtensor import any_dtensor, local_shards
from fastreg.core.layout import find_overlap
from fastreg.core.penalty import Strength, add_results, times
from fastreg.core.strengths import check_strength, checked, penalty_of_groups
from fastreg.core.torch_private import unscales_gradients
from fastreg.core.types import COUNTING, Mode, Request, Settings, StepInputs, Want, Work, states_of
from fastreg.formulas.penalty import ElasticNetPenalty, Penalty
from fastreg.selection.params import check_keys
from fastreg.sweep import agreement
from fastreg.sweep.agreement import strengths_of
from fastreg.sweep.dispatch import is_traced_now
from fastreg.sweep.sharded import Ownership, split_by_mesh
from fastreg.sweep.steps import apply_steps


class StepBatch(NamedTuple):
    """Parameters that make a step of the same mode, in the order of the param groups."""

    mode: Mode
    names: list[str]
    params: list[Tensor]
    states: list[dict[str, Any]]
    rows: list[tuple[int, bool]]  # of each strength group: its param group, and whether it makes a first step
    row_of: list[int | range]  # of each parameter: its strength group
    is_sharded: bool


class Plan(NamedTuple):
    """The batches of a step, which serve as long as the rest of the plan compares equal."""

    params: list[Tensor]  # all
    has_grad: list[bool]
    options: list[Any]  # of each param group, whatever decides the mode
    states: list[dict[str, Any]]  # all
    batches: list[StepBatch]


# The penalty's options of a param group, and their values without a penalty.
_OFF: dict[str, Any] = {"l1": 0.0, "l2": 0.0, "prox": False}


@unscales_gradients
class Penalized(Optimizer):
    """A mixin in front of one of torch.optim's classes, for a step with the penalty in it.

    Subclasses map a param group to a `Mode` and to its settings. The mode's entry in fastreg.core.types.STATES names
    the states.
    """

    _plan: Plan | None = None
    _track = False
    _impl: Impl = None
    # Lists, because compiled code cannot set attributes of an optimizer.
    _tracked: list[Penalty | None]
    _was_stepped: list[bool]
    _lacking: list[list[str]]  # of each param group, the options of the penalty that the last loaded state lacked

    def _init_penalty(self, l1: Strength, l2: Strength, prox: bool, track: bool, impl: Impl) -> None:
        """Add the penalty's options to those of torch.optim's class, whose constructor must have run."""
        check_impl(impl)
        if not isinstance(track, bool):
            raise TypeError(f"track must be True or False, got {track!r}")
        self._track, self._impl, self._tracked = track, impl, [None]
        self.defaults.update(
            l1=check_strength(l1, "l1"), l2=check_strength(l2, "l2"), prox=prox, fused=True, foreach=None
        )
        for i, group in enumerate(self.param_groups):
            self._add_options(group, i)
        self._was_stepped = [False]

    @property
    def last(self) -> Penalty | None:
        """The penalty before the last step, of the weights that had gradients; None without track=True.

        It counts the weights that this optimizer holds, and all shards of DTensors. Where each rank's optimizer holds
        other weights (ZeroRedundancyOptimizer, DeepSpeed, FSDP1, pipelines), it is the rank's share of the penalty.
        """
        return self._tracked[0]

    @property
    def has_strengths(self) -> bool:
        """Whether any group has a strength that is not the number 0."""
        return any(isinstance(g[name], Tensor) or g[name] != 0 for g in self.param_groups for name in ("l1", "l2"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch.optim. l1, l2 and prox are options of a group, as lr is."""
        n = len(self.param_groups)
        if isinstance(param_group, dict):
            check_keys(param_group, n)
        super().add_param_group(param_group)
        if "l1" in self.defaults:
            try:
                self._add_options(self.param_groups[n], n)
            except (TypeError, ValueError):
                del self.param_groups[n]
                raise

    def _add_options(self, group: dict[str, Any], number: int) -> None:
        """Add the missing options of param group `number`, and check all of them."""
        for name in _OFF:
            group.setdefault(name, self.defaults[name])
        # There is one implementation. With fused=True, torch.optim's class looks for the counters on the device when it
        # loads a checkpoint.
        group["fused"], group["foreach"] = True, None
        states_of(self._mode(group))
        self._settings(group, number, is_first=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, as in torch.optim.

        Groups without l1, l2 or prox get 0, 0 or False, with a warning if they had others.
        """
        before = [{name: group[name] for name in _OFF} for group in self.param_groups]
        super().load_state_dict(state_dict)
        lost = [
            i
            for i, (own, lacking) in enumerate(zip(before, self._lacking, strict=True))
            if any(isinstance(own[name], Tensor) or own[name] != _OFF[name] for name in lacking)
        ]
        if lost:
            names = [name for name in _OFF if any(name in self._lacking[i] for i in lost)]
            warn_user(
                f"the loaded state has no {' and '.join(names)} for param group{'s' * (len(lost) > 1)} "
                f"{' and '.join(map(str, lost))}, as a state of torch.optim's class: there, "
                f"{', '.join(f'{name} is now {_OFF[name]}' for name in names)}; assign them in optimizer.param_groups"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_track": self._track, "_impl": self._impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan, self._tracked, self._was_stepped = None, [None], [True]  # a copy need not step
        self._lacking = [[name for name in _OFF if name not in group] for group in self.param_groups]
        for group in self.param_groups:
            for name, value in _OFF.items():
                group.setdefault(name, value)
            group["fused"], group["foreach"] = True, None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step, with the penalty in it. Call `closure` before it, and return the result of `closure`.

        Raises RuntimeError for sparse gradients, TypeError for gradients or states that do not fit their weights, and
        ValueError for invalid options, before anything is changed.
        """
        self._was_stepped[0] = True  # for __del__
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        works, new_states = self._step_works()
        if new_states and makes_states_only(self):
            self.state.update(new_states)
            return loss
        # If the check of ranks is on, this compares their strengths.
        ownership = self._ownership() if self._track or agreement.IS_ON else None
        if self._track and ownership is not None:
            works = [split_by_mesh(work, ownership, request) for work, request in works]
        measures = apply_steps(works)
        if new_states:
            # If infinite gradients skipped a first step, discard its states. Reading the flag waits for the device.
            found_inf = getattr(self, "found_inf", None)
            if found_inf is None or not found_inf.item():
                for p, state in new_states:
                    self.state[p] = state
        if self._track:
            results = [work.penalty.result(each) for (work, _), each in zip(works, measures, strict=True)]
            if ownership is not None:
                self._tracked[0] = ownership.result(ElasticNetPenalty, results)
            elif results:
                self._tracked[0] = add_results(results)
        return loss

    def _ownership(self) -> Ownership | None:
        """Return which rank counts which parameter; None if none is sharded.

        All parameters count: ranks may differ in which of them have gradients.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        if not any_dtensor(params):
            return None
        return Ownership(params, True, strengths_of([self._penalty(group) for group in self.param_groups]))

    def _penalty(self, group: dict[str, Any]) -> ElasticNetPenalty:
        return checked(ElasticNetPenalty, group["l1"], group["l2"])

    def _step_works(self) -> tuple[list[tuple[Work, Request]], list[tuple[Tensor, dict[str, Any]]]]:
        """Return the steps to make, and the new states of parameters that make their first step."""
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
            batches, new_states = self._new_batches()
            plan = Plan(params, has_grad, options, list(self.state.values()), batches)
            # The settings of a first step do not serve the next one.
            self._plan = None if new_states or torch.compiler.is_compiling() else plan
        if len(plan.batches) == 1 and all(has_grad):
            return [self._step_work(plan.batches[0], grads)], new_states
        return [self._step_work(batch, [p.grad for p in batch.params]) for batch in plan.batches], new_states

    def _new_batches(self) -> tuple[list[StepBatch], list[tuple[Tensor, dict[str, Any]]]]:
        """Return the parameters that have gradients, with their states, and those of the states that are new."""
        stepped = [
            (group["param_names"][i] if "param_names" in group else f"groups[{number}].params[{i}]", p, number)
            for number, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        ]
        names, params = [name for name, _, _ in stepped], [p for _, p, _ in stepped]
        check_tensors(names, params)
        if not is_traced_now():
            check_overlap(names, find_overlap(local_shards(params)))
        batches: dict[Mode, StepBatch] = {}
        new_states: list[tuple[Tensor, dict[str, Any]]] = []
        is_sharded = any_dtensor(params)
        for name, p, number in stepped:
            mode = self._mode(self.param_groups[number])
            batch = batches.setdefault(mode, StepBatch(mode, [], [], [], [], [], is_sharded))
            state = self._state_of(p, mode)
            old = self.state.get(p, {})
            if state is not old and state:
                new_states.append((p, state))
            row = number, mode is Mode.MOMENTUM and not isinstance(old.get("momentum_buffer"), Tensor)
            if row not in batch.rows:
                batch.rows.append(row)
            batch.names.append(name)
            batch.params.append(p)
            batch.states.append(state)
            batch.row_of.append(batch.rows.index(row))
        return list(batches.values()), new_states

    def _step_work(self, batch: StepBatch, grads: list[Any]) -> tuple[Work, Request]:
        groups = [self.param_groups[i] for i, _ in batch.rows]
        settings = [self._settings(group, i, is_first) for group, (i, is_first) in zip(groups, batch.rows, strict=True)]
        penalty = ElasticNetPenalty((0.0, 0.0))
        if self._track:
            rows = [self._penalty(group).strengths for group in groups]
            penalty = penalty_of_groups(ElasticNetPenalty, rows, batch.params[0].device)
        n, is_traced = len(groups), is_traced_now()
        work = Work(batch.names, batch.params, batch.row_of, n, penalty, self._impl, batch.is_sharded, is_traced)
        states = {name: [state[name] for state in batch.states] for name in states_of(batch.mode)}
        counts = [state["step"] for state in batch.states] if batch.mode in COUNTING else None
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        step = StepInputs(settings, states, counts, scale, found_inf)
        return work, Request(batch.mode, Want.TERMS if self._track else Want.NOTHING, grads, step=step)

    def _state_of(self, p: Tensor, mode: Mode) -> dict[str, Any]:
        """Return the state of `p` if it has all that the mode reads, else a new one, with zeros as in torch.optim."""
        names = states_of(mode)
        old: dict[str, Any] = self.state.get(p, {})
        if all(isinstance(old.get(name), Tensor) for name in names) and (
            mode not in COUNTING or _is_counter(old.get("step"), p)
        ):
            return old
        state = dict(old)
        with torch.inference_mode(False):
            if mode in COUNTING:
                state["step"] = torch.as_tensor(old.get("step", 0.0), dtype=torch.float32).to(p.device, copy=True)
            for name in names:
                if not isinstance(old.get(name), Tensor):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def __del__(self) -> None:
        # Accelerate and Trainer may replace the optimizer that they are given, without a word.
        if "deepspeed" in sys.modules and not getattr(self, "_was_stepped", [True])[0] and self.has_strengths:
            warn_user(
                f"this fastreg.optim.{type(self).__name__} has strengths but was never stepped, so its penalty was not "
                "applied. With offload, Accelerate replaces it by DeepSpeedCPUAdam unless DeepSpeed's configuration "
                "has zero_force_ds_cpu_optimizer: false. Under DeepSpeed, Trainer takes optimizer_cls_and_kwargs, not "
                "optimizers"
            )

    # A subclass defines these two.

    def _mode(self, group: dict[str, Any]) -> Mode:
        raise NotImplementedError

    def _settings(self, group: dict[str, Any], number: int, is_first: bool) -> Settings:
        """Return the numbers of a param group as they are now; raise TypeError or ValueError for invalid ones."""
        raise NotImplementedError


def _is_counter(step: object, p: Tensor) -> bool:
    """Return whether kernels can count steps in `step`."""
    return isinstance(step, Tensor) and step.device == p.device and step.dtype == torch.float32


def makes_states_only(optimizer: Optimizer) -> bool:
    """Return whether this is the step by which torch.distributed.checkpoint learns the names of an optimizer's states.

    That is a first step of all parameters with lr=0 and zero gradients, in which a penalty would enter the moments.
    The gradients are read, which waits for the device, only if every lr is the number 0 and there is no state.
    """
    if optimizer.state or torch.compiler.is_compiling():
        return False
    if isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in optimizer.param_groups):
        return False  # has no states, so that every step looks like a first one
    for group in optimizer.param_groups:
        lr = group.get("lr")
        if (isinstance(lr, Tensor) and lr.device.type != "cpu") or lr != 0:
            return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not any(grad.layout != torch.strided or bool(grad.any()) for grad in grads)


def learning_rate(group: dict[str, Any], number: int) -> Strength:
    """Return the lr of param group `number`; ValueError if it has none or one that is negative, NaN or infinite."""
    lr = group.get("lr")
    if lr is None:
        raise ValueError(f"param group {number} of the optimizer has no lr, by which a proximal step would shrink")
    if isinstance(lr, Tensor):
        # Reading host memory does not wait, but a compiler would break the graph there.
        lr = lr.item() if lr.device.type == "cpu" and not torch.compiler.is_compiling() else lr.reshape(())
    return check_strength(lr, f"lr of param group {number}")


def penalty_strengths(
    group: dict[str, Any], number: int, factor: float = 1.0
) -> tuple[Strength, Strength, Strength, Strength]:
    """Return l1 and l2 for the gradient, and l1 and l2 times `factor` for the proximal step: one of both pairs is 0."""
    if group.get("maximize"):
        raise ValueError("maximize=True would reward the penalty; minimize -loss instead")
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not supported: the step is one operation without a derivative")
    l1, l2 = (check_strength(group[name], f"{name} of param group {number}") for name in ("l1", "l2"))
    if not isinstance(group["prox"], bool):
        raise TypeError(f"prox of param group {number} must be True or False, got {group['prox']!r}")
    if not group["prox"]:
        return l1, l2, 0.0, 0.0
    return (0.0, 0.0, l1, l2) if factor == 1 else (0.0, 0.0, times(l1, factor), times(l2, factor))
