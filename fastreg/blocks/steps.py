"""Steps of optimizers on the PyTorch path: block by block, with the penalty in cache and PyTorch's fused operators."""

from collections.abc import Sequence

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
from fastreg.core.types import Mode, Request, Settings, Work
from fastreg.formulas.steps import take_steps, with_rounding

_FLOAT32_MAX = torch.finfo(torch.float32).max


def take_block_steps(parts: Sequence[Part], work: Work, request: Request) -> None:
    """What `formulas.take_steps` does to the weights, states and counters of the parts of one device.

    Off the host, without fused operators, and with strengths beyond float32, it is done by those expressions.
    """
    mode, grads, update = request.mode, request.grads, request.step
    assert update is not None
    positions = [position for part in parts for position in part.positions]
    on_host = parts[0].device.type == "cpu"
    settings = [Settings(*[x.item() if isinstance(x, Tensor) else x for x in s]) for s in update.settings if on_host]
    if not on_host or not HAS_FUSED_STEPS or any(abs(x) > _FLOAT32_MAX for s in settings for x in s):
        weights, own_grads, *states = [
            None if t is None else [t[position] for position in positions]
            for t in (work.weights, grads, *update.states, update.steps)
        ]
        assert weights is not None
        own = update._replace(states=(states[0], states[1], states[2]), steps=states[3])
        take_steps(mode, weights, own_grads, [work.groups[position] for position in positions], own)
        return
    if update.found_inf is not None and update.found_inf.item():
        return
    steps = update.steps
    if steps is not None and mode is not Mode.ADAM_PROX:
        foreach_add_([steps[position] for position in positions], 1)
    memory = take_memory(parts[0].device, 0 if is_under_a_mode() else reserve())
    try:
        for part in parts:
            plan = part.prepared(BlockPlan)
            pieces = [None if t is None else plan.pieces_of(t) for t in (work.weights, grads, *update.states)]
            of_pieces = None if steps is None else plan.for_pieces(steps)
            ops = BlockSteps(part.dtype, mode, update.grad_scale, memory)
            for block in plan.blocks:
                for numbers in [*((number,) for number in block.in_place), block.packed]:
                    if numbers:
                        own_steps = None if of_pieces is None else [of_pieces[i] for i in numbers]
                        chosen = [None if p is None else [p[i] for i in numbers] for p in pieces]
                        ops.take(chosen, own_steps, settings[block.group])
    finally:
        give_back(memory)


class BlockSteps:
    """Steps of one kind of optimizer on pieces of weights of one dtype, in host memory."""

    def __init__(self, dtype: torch.dtype, mode: Mode, grad_scale: Tensor | None, memory: Memory) -> None:
        self._compute = compute_dtype(dtype)
        self._dtype, self._is_narrow = dtype, dtype != self._compute
        self._mode = mode
        self._grad_scale = None if grad_scale is None else grad_scale.float()
        self._memory = memory
        self._ops = memory.kept(dtype, BlockOps)

    def take(self, pieces: Sequence[Pieces | None], steps: Sequence[Tensor] | None, s: Settings) -> None:
        """One step of the same pieces of weights, gradients and three states, where there are such."""
        weights, grads, *states = pieces
        assert weights is not None
        # Narrow numbers are worked on as float32 copies throughout; others only where one operator serves many pieces.
        copied = [None if p is None or not self._is_narrow else self._copy(str(i), p) for i, p in enumerate(states)]
        operands = [p if copy is None else copy.parts for p, copy in zip(states, copied, strict=True)]
        has_penalty = any(strength != 0 for strength in (s.l1, s.l2, s.prox_l1, s.prox_l2))
        packed = self._copy("weights", weights) if self._is_narrow or (len(weights) > 1 and has_penalty) else None
        targets = packed.parts if packed is not None and self._is_narrow else weights
        if grads is not None:
            grads = self._penalised(packed, weights, grads, s)
            self._fused(targets, grads, operands, steps, s)
        if self._mode is Mode.ADAM_PROX or s.prox_l1 != 0 or s.prox_l2 != 0:
            self._shrink(packed, weights, operands, steps, s)
        if self._is_narrow:
            copy_pieces(weights, targets)
            for state, operand in zip(states, operands, strict=True):
                if state is not None and operand is not None and self._mode is not Mode.ADAM_PROX:
                    copy_pieces(state, operand)

    def _copy(self, name: str, pieces: Pieces) -> Pack:
        pack = self._memory.pack(name, self._compute, shapes_of(pieces), LANES)
        copy_pieces(pack.parts, pieces)
        return pack

    def _penalised(self, packed: Pack | None, weights: Pieces, grads: Pieces, s: Settings) -> Pieces:
        """The gradients with what of the penalty's the operators do not add; copies, unless they may be taken as is.

        Where gradients carry a scale, so does what is added, and the operators would unscale them in their place.
        """
        slope = 0.0 if self._adds_l2(s) else 2 * s.l2
        scale = 1.0 if self._grad_scale is None else self._grad_scale.item()
        has_penalty = s.l1 != 0 or slope != 0
        if not self._is_narrow and not has_penalty and self._grad_scale is None:
            return grads
        found = self._memory.pack("gradient", self._compute, shapes_of(weights), LANES)
        if not has_penalty and packed is None:
            copy_pieces(found.parts, grads)
            return found.parts
        if packed is None:
            (w,), (grad,), (out,) = weights, grads, found.parts
        else:
            w, out, grad = packed.vector, found.vector, found.vector
            copy_pieces(found.parts, grads)
        if s.l1 != 0:
            sign = torch.sign(w, out=out if out is not grad else self._spare("spare", w))
            torch.add(grad, sign, alpha=s.l1 * scale, out=out)
        elif out is not grad:
            out.copy_(grad)
        if slope != 0:
            out.add_(w, alpha=slope * scale)
        return found.parts

    def _adds_l2(self, s: Settings) -> bool:
        """Whether the operators add 2 * l2 * w as weight decay, which has no other use then."""
        return not (s.is_decoupled and s.weight_decay != 0)

    def _fused(
        self, weights: Pieces, grads: Pieces, states: Sequence[Pieces | None], steps: Pieces | None, s: Settings
    ) -> None:
        first, second, third = states
        adds_l2 = self._adds_l2(s)
        decay = s.weight_decay + 2 * s.l2 if adds_l2 else s.weight_decay
        if second is None:
            fused_sgd_(
                weights, grads, first or [],
                weight_decay=decay, momentum=s.first, lr=s.lr, dampening=s.second, nesterov=bool(s.third),
                maximize=False, is_first_step=False, grad_scale=self._grad_scale,
            )  # fmt: skip
        else:
            step = fused_adam_ if adds_l2 else fused_adamw_
            step(
                weights, grads, first, second, third or [], steps,
                lr=s.lr, beta1=s.first, beta2=s.second, weight_decay=decay, eps=s.third,
                amsgrad=third is not None, maximize=False, grad_scale=self._grad_scale,
            )  # fmt: skip

    def _shrink(
        self, packed: Pack | None, weights: Pieces, states: Sequence[Pieces | None], steps: Pieces | None, s: Settings
    ) -> None:
        """The proximal step of the weights, or of their copies if these are worked on."""
        if packed is not None and not self._is_narrow:
            copy_pieces(packed.parts, weights)
        square = states[2] or states[1]
        w = weights[0] if packed is None else packed.vector
        if square is None:
            self._ops.prox(w, s.lr * s.prox_l1, s.lr * s.prox_l2, self._spare("spare", w))
        else:
            made = [s.step + (0.0 if steps is None else step.item()) for step in steps or weights[:1]]
            if len(set(made)) == 1:
                v = square[0] if packed is None else self._copy("square", square).vector
                self._shrink_by(w, v, made[0], s)
            else:
                for part, v, step in zip(packed.parts if packed is not None else weights, square, made, strict=True):
                    self._shrink_by(part, v, step, s)
        if packed is not None and not self._is_narrow:
            copy_pieces(weights, packed.parts)

    def _shrink_by(self, w: Tensor, square: Tensor, step: float, s: Settings) -> None:
        """By t = lr / (sqrt(square / c) + eps), c = 1 - beta2^step: both sides of the fraction times the root of c.

        No further than steps of Adam go, and on a first step not at all where there was no gradient.
        """
        reach = s.lr * with_rounding(s.reach, self._dtype)
        before = None
        if s.prox_l2 != 0 or step == 1:
            before = self._spare("before", w).copy_(w)
        root = (1 - s.second**step) ** 0.5
        size = s.lr * root
        bottom = torch.sqrt(square, out=self._spare("denominator", w)).add_(s.third * root)
        bound, spare = self._spare("bound", w), self._spare("spare", w)
        slope = 2 * s.prox_l2
        if s.prox_l1 != 0:
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

    def _spare(self, name: str, w: Tensor) -> Tensor:
        return self._memory.pack(name, self._compute, (w.shape,)).parts[0]
