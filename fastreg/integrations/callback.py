"""What the callbacks share: a penalty that is attached to the optimizers while a model is trained."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastreg.core.strengths import check_strength
from fastreg.core.types import Penalty, Strength
from fastreg.elastic_net import ElasticNet
from fastreg.optim.attachment import Attachment, check_mode
from fastreg.selection.filters import Filter, check_filter
from fastreg.selection.selection import select
from fastreg.sparsity import sparsity

AttachMode: TypeAlias = Literal["grad", "prox"]
Metric: TypeAlias = Literal["optimizer", "lr"] | None


class AttachedPenalty:
    """Attaches `ElasticNet(model, l1, l2)` when training begins, and detaches it when it ends."""

    def __init__(
        self,
        l1: Strength | None = None,
        l2: Strength | None = None,
        *,
        mode: AttachMode = "grad",
        metric: Metric = None,
        include: Filter = None,
        exclude: Filter = None,
    ) -> None:
        if l1 is None and l2 is None:
            raise TypeError("ElasticNetCallback needs l1 or l2, which may be 0.0 if they are assigned later")
        check_mode(mode, metric)
        check_filter(include, "include")
        check_filter(exclude, "exclude")
        self._l1, self._l2 = (check_strength(0.0 if s is None else s, n) for s, n in ((l1, "l1"), (l2, "l2")))
        self._mode: AttachMode = mode
        self._metric: Metric = metric
        self._include, self._exclude = include, exclude
        self._model: nn.Module | None = None
        self._last: Penalty | None = None  # of training that is over
        self._regs: list[ElasticNet] = []
        self._attachments: list[Attachment] = []

    @property
    def l1(self) -> Strength:
        """Strength of Σ|w|, which may be assigned at any time, as that of an `ElasticNet`."""
        return self._l1

    @l1.setter
    def l1(self, value: Strength) -> None:
        self._l1 = check_strength(value, "l1")
        for reg in self._regs:
            reg.l1 = self._l1

    @property
    def l2(self) -> Strength:
        """Strength of Σw², likewise."""
        return self._l2

    @l2.setter
    def l2(self, value: Strength) -> None:
        self._l2 = check_strength(value, "l2")
        for reg in self._regs:
            reg.l2 = self._l2

    @property
    def last(self) -> Penalty | None:
        """The `Penalty` of the last step, of several optimizers the sum of theirs; None before the first one."""
        found = [reg.last for reg in self._regs if reg.last is not None]
        if len(found) < 2:
            return found[0] if found else self._last
        device = found[0].total.device
        return Penalty(*(torch.stack([x.to(device) for x in term]).sum() for term in zip(*found, strict=True)))

    def _attach(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Attaches the penalty; of several optimizers each gets the part that is of its weights."""
        self.detach()  # from training that was interrupted
        self._last = None
        for optimizer, reg in self._parts(model, optimizers):
            self._attachments.append(reg.attach(optimizer, self._mode, metric=self._metric))
            self._regs.append(reg)
        self._model = model

    def _parts(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> list[tuple[Optimizer, ElasticNet]]:
        if len(optimizers) == 1:  # and what is thawed or replaced later will count
            reg = ElasticNet(model, self._l1, self._l2, include=self._include, exclude=self._exclude)
            return [(optimizers[0], reg)]
        work = select(model, self._l1, self._l2, self._include, self._exclude, None)
        named = list(zip(work.names, work.weights, strict=True))
        held = [{id(p) for group in each.param_groups for p in group["params"]} for each in optimizers]
        for name, w in named:
            if not any(id(w) in ids for ids in held):
                raise ValueError(f"parameter {name!r} is in none of the {len(held)} optimizers; exclude it")
        parts = [[(name, w) for name, w in named if id(w) in ids] for ids in held]
        pairs = zip(optimizers, parts, strict=True)
        return [(optimizer, ElasticNet(part, self._l1, self._l2)) for optimizer, part in pairs if part]

    def detach(self) -> None:
        """Takes the penalty off the optimizers, as at the end of training; further calls do nothing."""
        self._last = self.last
        for attachment in self._attachments:
            attachment.remove()
        self._model, self._regs, self._attachments = None, [], []

    def _metrics(self, number: int) -> dict[str, Tensor]:
        """What to log, 0-dim tensors: the terms of the last step, and the share of exact zeros now.

        `number` is 1, or larger where others log their own.
        """
        last = self.last
        if last is None or self._model is None:
            return {}
        zeros = sparsity(self._model, include=self._include, exclude=self._exclude)
        found = {"l1": last.l1, "l2": last.l2, "sparsity": zeros}
        return {f"regularization{'' if number == 1 else f'_{number}'}/{name}": value for name, value in found.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Optimizers leave their hooks behind when they are pickled, and so does this.
        return {**self.__dict__, "_last": self.last, "_model": None, "_regs": [], "_attachments": []}


AttachedPenalty.__init__.__qualname__ = "ElasticNetCallback.__init__"  # which errors about arguments name
