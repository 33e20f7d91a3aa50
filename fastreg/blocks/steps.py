"""Steps of optimizers on the PyTorch path: block by block, with the penalty in cache and PyTorch's fused operators."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.blocks.penalty import BlockOps, Pieces, copy_pieces, shapes_of
from fastreg.blocks.plan import LANES, BlockPlan, reserve
from fastreg.blocks.scratch import Memory, Pack, give_back, take_memory
from fastreg.core.dtypes import compute_dtype
from fastreg.core.layout import Part
from fastreg.core.torch_private import (
    HAS_FUSED_STEPS,
    foreach_add_,
    fused_adam_,
    fused_adamw_,
    fused_sgd_,
    is_under_a_mode,
)
from fastreg.core.types import (
    COUNTING,
    STEPS,
    AdamSettings,
    ElementwiseProxSettings,
    Mode,
    Request,
    SGDSettings,
    Work,
)
from fastreg.formulas.steps import has_prox, take_steps, with_rounding

_FLOAT32_MAX = torch.finfo(torch.float32).max
# The state that an elementwise step size is computed from.
_SQUARE = {Mode.ADAM: "exp_avg_sq", Mode.AMSGRAD: "max_exp_avg_sq", Mode.ELEMENTWISE_PROX: "square"}
_WITHOUT_SQUARE = (Mode.SGD, Mode.MOMENTUM)


def take_block_steps(parts: Sequence[Part], work: Work, request: Request) -> None:
    """Do what `formulas.take_steps` does, for the parts of one device.

    On devices other than the CPU, without PyTorch's fused operators, and with numbers beyond float32, this calls
    `take_steps`. Raises ValueError for a mode that has no block step, before anything is written.
    """
    mode, grads, step = request.mode, request.grads, request.step
    if step is None or (mode not in _SQUARE and mode not in _WITHOUT_SQUARE):
        raise ValueError(f"fastreg.blocks.steps makes no step of {mode}")
    positions = [position for part in parts for position in part.positions]
    on_host = parts[0].device.type == "cpu"
    settings = [type(s)(*[x.item() if isinstance(x, Tensor) else x for x in s]) for s in step.settings if on_host]
    scale = 1.0 if step.grad_scale is None or not on_host else step.grad_scale.item()
    if not on_host or not HAS_FUSED_STEPS or not all([_fits_float32(s, scale) for s in settings]):

        def own(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensors[position] for position in positions]

        own_step = step.mapped(own)._replace(steps=None if step.steps is None else own(step.steps))
        groups = [work.groups[position] for position in positions]
        take_steps(mode, own(work.weights), None if grads is None else own(grads), groups, own_step)
        return
    if step.found_inf is not None and step.found_inf.item():
        return
    counts = step.steps
    if mode in COUNTING and counts is not None:
        foreach_add_([counts[position] for position in positions], 1)
    memory = take_memory(parts[0].device, 0 if is_under_a_mode() else reserve())
    try:
        for part in parts:
            plan = part.prepared(BlockPlan)
            weights = plan.pieces_of(work.weights)
            own_grads = None if grads is None else plan.pieces_of(grads)
            states = {name: plan.pieces_of(tensors) for name, tensors in step.states.items()}
            own_counts = None if counts is None else plan.for_pieces(counts)
            ops = BlockSteps(part.dtype, mode, step.grad_scale, memory)
            for block in plan.blocks:
                for numbers in [*((number,) for number in block.in_place), block.packed]:
                    if numbers:
                        ops.take(
                            [weights[i] for i in numbers],
                            None if own_grads is None else [own_grads[i] for i in numbers],
                            {name: [pieces[i] for i in numbers] for name, pieces in states.items()},
                            None if own_counts is None else [own_counts[i] for i in numbers],
                            settings[block.group],
                        )
    finally:
        give_back(memory)


@functools.lru_cache(maxsize=64, typed=True)
def _fits_float32(s: Any, grad_scale: float) -> bool:
    """Return whether operators take the settings and all numbers formed of them: beyond float32 they raise."""
    slope = 2 * getattr(s, "l2", 0.0) + getattr(s, "weight_decay", 0.0)
    products = (s.lr * s.prox_l1, 2 * s.lr * s.prox_l2, slope * grad_scale, getattr(s, "l1", 0.0) * grad_scale)
    longest = 2 * s.lr * getattr(s, "reach", 1.0)  # more than what roundings add
    return all(abs(x) <= _FLOAT32_MAX for x in (*s, *products, longest))


class BlockSteps:
    """Steps of one mode on pieces of weights of one dtype, in host memory."""

    def __init__(self, dtype: torch.dtype, mode: Mode, grad_scale: Tensor | None, memory: Memory) -> None:
        self._compute = compute_dtype(dtype)
        self._dtype, self._is_narrow = dtype, dtype != self._compute
        self._mode = mode
        self._grad_scale = None if grad_scale is None else grad_scale.float()
        self._memory = memory
        self._ops = memory.kept(dtype, BlockOps)

    def take(
        self, weights: Pieces, grads: Pieces | None, states: dict[str, Pieces], counts: Pieces | None, s: Any
    ) -> None:
        """Make one step of pieces of weights, with the same pieces of gradients and states, and their counters."""
        # Operators work on float32 copies of narrow numbers, and on a copy where one operator serves many pieces.
        operands = states
        if self._is_narrow:
            operands = {name: self._copy(f"state {name}", pieces).parts for name, pieces in states.items()}
        is_step = self._mode in STEPS
        has_penalty = has_prox(s) or (is_step and (s.l1 != 0 or s.l2 != 0))
        packed = self._copy("weights", weights) if self._is_narrow or (len(weights) > 1 and has_penalty) else None
        targets = packed.parts if packed is not None and self._is_narrow else weights
        if is_step:
            assert grads is not None
            grads = self._gradient_with_penalty(packed, weights, grads, s)
            if self._mode in _WITHOUT_SQUARE:
                self._fused_sgd(targets, grads, operands, s)
            else:
                self._fused_adam(targets, grads, operands, counts, s)
        if has_prox(s):
            self._shrink(packed, weights, operands, counts, s)
        if self._is_narrow:
            copy_pieces(weights, targets)
            if is_step:
                for name, pieces in states.items():
                    copy_pieces(pieces, operands[name])

    def _copy(self, name: str, pieces: Pieces) -> Pack:
        pack = self._memory.pack(name, self._compute, shapes_of(pieces), LANES)
        copy_pieces(pack.parts, pieces)
        return pack

    def _gradient_with_penalty(
        self, packed: Pack | None, weights: Pieces, grads: Pieces, s: SGDSettings | AdamSettings
    ) -> Pieces:
        """Return the gradients plus the part of the penalty's that the fused operators do not add.

        The result is a copy, except where `grads` can be passed on as they are. Fused operators divide gradients by
        their scale in place, so scaled gradients are always copied, and what is added carries the same scale.
        """
        slope = 0.0 if self._adds_l2(s) else 2 * s.l2
        scale = 1.0 if self._grad_scale is None else self._grad_scale.item()
        has_penalty = s.l1 != 0 or slope != 0
        if not self._is_narrow and not has_penalty and self._grad_scale is None:
            return grads
        sums = self._memory.pack("gradient", self._compute, shapes_of(weights), LANES)
        if not has_penalty and packed is None:
            copy_pieces(sums.parts, grads)
            return sums.parts
        if packed is None:
            (w,), (grad,), (out,) = weights, grads, sums.parts
        else:
            w, out, grad = packed.vector, sums.vector, sums.vector
            copy_pieces(sums.parts, grads)
        if s.l1 != 0:
            sign = torch.sign(w, out=out if out is not grad else self._spare("spare", w))
            torch.add(grad, sign, alpha=s.l1 * scale, out=out)
        elif out is not grad:
            out.copy_(grad)
        if slope != 0:
            out.add_(w, alpha=slope * scale)
        return sums.parts

    def _adds_l2(self, s: SGDSettings | AdamSettings) -> bool:
        """Return whether the operators add 2 * l2 * w as weight decay, which they can unless that is decoupled."""
        return not (s.is_decoupled and s.weight_decay != 0)

    def _decay(self, s: SGDSettings | AdamSettings) -> Any:
        return s.weight_decay + 2 * s.l2 if self._adds_l2(s) else s.weight_decay

    def _fused_sgd(self, weights: Pieces, grads: Pieces, states: dict[str, Pieces], s: SGDSettings) -> None:
        fused_sgd_(
            weights, grads, states["momentum_buffer"] if self._mode is Mode.MOMENTUM else [],
            weight_decay=self._decay(s), momentum=s.momentum, lr=s.lr, dampening=s.dampening,
            nesterov=bool(s.nesterov), maximize=False, is_first_step=False, grad_scale=self._grad_scale,
        )  # fmt: skip

    def _fused_adam(
        self, weights: Pieces, grads: Pieces, states: dict[str, Pieces], counts: Pieces | None, s: AdamSettings
    ) -> None:
        has_maximum = self._mode is Mode.AMSGRAD
        step: Any = fused_adam_ if self._adds_l2(s) else fused_adamw_
        step(
            weights, grads, states["exp_avg"], states["exp_avg_sq"], states["max_exp_avg_sq"] if has_maximum else [],
            counts, lr=s.lr, beta1=s.beta1, beta2=s.beta2, weight_decay=self._decay(s), eps=s.eps,
            amsgrad=has_maximum, maximize=False, grad_scale=self._grad_scale,
        )  # fmt: skip

    def _shrink(
        self, packed: Pack | None, weights: Pieces, states: dict[str, Pieces], counts: Pieces | None, s: Any
    ) -> None:
        """Make the proximal step of the weights, or of their copies where these hold the result of the step."""
        if packed is not None and not self._is_narrow:
            copy_pieces(packed.parts, weights)
        w = weights[0] if packed is None else packed.vector
        if self._mode in _WITHOUT_SQUARE:
            self._ops.prox(w, s.lr * s.prox_l1, s.lr * s.prox_l2, self._spare("spare", w))
        else:
            square = states[_SQUARE[self._mode]]
            steps = [0.0] if counts is None else [count.item() for count in counts]
            if self._mode is Mode.ELEMENTWISE_PROX:
                steps = [s.steps_made + count for count in steps]
            if len(set(steps)) == 1:
                v = square[0] if packed is None else self._copy("square", square).vector
                self._shrink_elementwise(w, v, steps[0], s)
            else:
                parts = weights if packed is None else packed.parts
                for part, v, step in zip(parts, square, steps, strict=True):
                    self._shrink_elementwise(part, v, step, s)
        if packed is not None and not self._is_narrow:
            copy_pieces(weights, packed.parts)

    def _shrink_elementwise(
        self, w: Tensor, square: Tensor, step: float, s: AdamSettings | ElementwiseProxSettings
    ) -> None:
        """Make the proximal step of size t = lr / (sqrt(square / c) + eps), c = 1 - beta2^step.

        Here both sides of that fraction are multiplied by sqrt(c). No element moves further than lr * reach, and on a
        first step those without gradient do not move.
        """
        reach = s.lr * with_rounding(s.reach, self._dtype)
        before = None
        if s.prox_l2 != 0 or step == 1:
            before = self._spare("before", w).copy_(w)
        root = (1 - s.beta2**step) ** 0.5
        size = s.lr * root
        bottom = torch.sqrt(square, out=self._spare("denominator", w)).add_(s.eps * root)
        bound, spare = self._spare("bound", w), self._spare("spare", w)
        slope = 2 * s.prox_l2
        if not self._is_ratio_exact(size * s.prox_l1, slope, s.prox_l1):
            torch.div(self._memory.number(size, self._compute), bottom, out=bound)
            torch.neg(torch.mul(bound, s.prox_l1, out=spare), out=bottom)
            w.sub_(torch.clamp(w, bottom, spare, out=bottom))
            w.div_(torch.add(self._memory.number(1.0, self._compute), bound, alpha=slope, out=bound))
        elif s.prox_l1 != 0:
            torch.div(self._memory.number(size * s.prox_l1, self._compute), bottom, out=bound)
            if before is None:
                bound.clamp_(max=reach)
            torch.neg(bound, out=spare)
            w.sub_(torch.clamp(w, spare, bound, out=bottom))
            if slope != 0:
                w.div_(torch.add(self._memory.number(1.0, self._compute), bound, alpha=slope / s.prox_l1, out=bound))
        elif slope != 0:
            w.div_(torch.div(self._memory.number(size * slope, self._compute), bottom, out=bound).add_(1.0))
        if before is not None:
            torch.clamp(w, torch.sub(before, reach, out=bound), torch.add(before, reach, out=spare), out=w)
            if step == 1:
                torch.where(square == 0, before, w, out=w)

    def _is_ratio_exact(self, threshold: float, slope: float, l1: float) -> bool:
        """Return whether t * slope may be formed as t * l1 * (slope / l1): not if t * l1 is tiny or the ratio large."""
        return slope == 0 or l1 == 0 or (threshold >= torch.finfo(self._compute).tiny and slope <= 2.0**100 * l1)

    def _spare(self, name: str, w: Tensor) -> Tensor:
        return self._memory.pack(name, self._compute, (w.shape,)).parts[0]
