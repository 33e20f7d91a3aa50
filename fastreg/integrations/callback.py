"""Base classes of the callbacks: a penalty that is attached to the optimizers during training."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from fastreg.core.penalty import Strength, add_results
from fastreg.core.strengths import check_strength
from fastreg.elastic_net import ElasticNet
from fastreg.optim.attachment import Attachment, check_mode
from fastreg.regularizer import Regularizer
from fastreg.selection.filters import Filter, check_filter
from fastreg.selection.fsdp import reshard
from fastreg.sparsity import sparsity

AttachMode: TypeAlias = Literal["grad", "prox"]
Metric: TypeAlias = Literal["optimizer", "lr"] | None


class AttachedPenalty:
    """Attach a penalty to the optimizers when training begins, and detach it when it ends.

    A subclass sets `_REGULARIZER`, and has an argument and a property for each strength.
    """

    _REGULARIZER: ClassVar[type[Regularizer[Any]]]

    def __init__(
        self, strengths: Mapping[str, Strength], mode: AttachMode, metric: Metric, include: Filter, exclude: Filter
    ) -> None:
        check_mode(mode, metric)
        check_filter(include, "include")
        check_filter(exclude, "exclude")
        self._strengths = {name: check_strength(s, name) for name, s in strengths.items()}
        self._mode: AttachMode = mode
        self._metric: Metric = metric
        self._filters: dict[str, Filter] = {"include": include, "exclude": exclude}
        self._model: nn.Module | None = None
        self._last: Any = None  # of an earlier training run
        self._regs: list[Regularizer[Any]] = []
        self._attachments: list[Attachment] = []

    def _assign(self, name: str, strength: Strength) -> None:
        self._strengths[name] = check_strength(strength, name)
        for reg in self._regs:
            setattr(reg, name, self._strengths[name])

    @property
    def last(self) -> Any:
        """The penalty at the last step, summed over the optimizers; None before the first step."""
        results = [reg.last for reg in self._regs if reg.last is not None]
        return add_results(results) if results else self._last

    def _attach(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Attach the penalty. With several optimizers, each gets the penalty of its own weights."""
        self.detach()  # an interrupted training run may have left attachments
        self._last = None
        reshard(model.modules())  # Trainers evaluate before the first step, too
        for optimizer, reg in self._parts(model, optimizers):
            self._attachments.append(reg.attach(optimizer, self._mode, metric=self._metric))
            self._regs.append(reg)
        self._model = model

    def _parts(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> list[tuple[Optimizer, Regularizer[Any]]]:
        if len(optimizers) == 1:  # the module itself, so that later changes of its parameters count
            return [(optimizers[0], self._regularizer(model, self._filters))]
        work = self._regularizer(model, self._filters)._current()
        named = list(zip(work.names, work.weights, strict=True))
        held = [{id(p) for group in each.param_groups for p in group["params"]} for each in optimizers]
        for name, w in named:
            if not any(id(w) in ids for ids in held):
                raise ValueError(f"parameter {name!r} is in none of the {len(held)} optimizers; exclude it")
        parts = [[(name, w) for name, w in named if id(w) in ids] for ids in held]
        pairs = zip(optimizers, parts, strict=True)
        return [(optimizer, self._regularizer(part, {})) for optimizer, part in pairs if part]

    def _regularizer(self, params: Any, filters: dict[str, Filter]) -> Regularizer[Any]:
        return self._REGULARIZER(params, **self._strengths, **filters)  # type: ignore[arg-type, call-arg]

    def detach(self) -> None:
        """Detach the penalty from the optimizers. Further calls do nothing."""
        self._last = self.last
        for attachment in self._attachments:
            attachment.remove()
        self._model, self._regs, self._attachments = None, [], []

    def _metrics(self, number: int) -> dict[str, Tensor]:
        """Return the metrics to log, 0-dim tensors: the terms of the last step, and the current share of exact zeros.

        `number` is part of the metrics' names if it is not 1: with several callbacks, it counts them.
        """
        last = self.last
        if last is None or self._model is None:
            return {}
        values = {name: getattr(last, name) for name in self._strengths}
        reshard(self._model.modules())
        values["sparsity"] = sparsity(self._model, **self._filters)
        return {f"regularization{'' if number == 1 else f'_{number}'}/{name}": value for name, value in values.items()}

    def __getstate__(self) -> dict[str, Any]:
        # Pickled optimizers lose their hooks, so a copy is not attached.
        return {**self.__dict__, "_last": self.last, "_model": None, "_regs": [], "_attachments": []}


class AttachedElasticNet(AttachedPenalty):
    """Attach an `ElasticNet`."""

    _REGULARIZER = ElasticNet

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
            raise TypeError("ElasticNetCallback needs l1 or l2; pass 0.0 to assign them later")
        strengths = {"l1": 0.0 if l1 is None else l1, "l2": 0.0 if l2 is None else l2}
        super().__init__(strengths, mode, metric, include, exclude)

    @property
    def l1(self) -> Strength:
        """Strength of Σ|w|. It can be assigned at any time."""
        return self._strengths["l1"]

    @l1.setter
    def l1(self, value: Strength) -> None:
        self._assign("l1", value)

    @property
    def l2(self) -> Strength:
        """Strength of Σw². It can be assigned at any time."""
        return self._strengths["l2"]

    @l2.setter
    def l2(self, value: Strength) -> None:
        self._assign("l2", value)


AttachedElasticNet.__init__.__qualname__ = "ElasticNetCallback.__init__"  # for Python's errors about arguments
