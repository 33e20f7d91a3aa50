"""A callback for the Trainer of Lightning."""

import operator
from collections.abc import Sequence
from typing import Any

from fastreg.formulas.penalty import Penalty
from fastreg.integrations.callback import AttachedElasticNet

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "fastreg.integrations.lightning is for Lightning's Trainer: pip install lightning"
        ) from error


class ElasticNetCallback(AttachedElasticNet, Callback):
    """Apply the penalty at every optimizer step of a Lightning `Trainer`, once, after any number of micro-batches.

    Automatic and manual optimization are supported. With several optimizers, each applies the penalty of its own
    weights. The gradient is added after gradient clipping, which does not see it, and after the unscaling of mixed
    precision. The logged loss is the data's.

    On steps that Lightning logs, the callback logs `regularization/l1` and `regularization/l2`, the weighted terms of
    the last step, and `regularization/sparsity`, the share of exact zeros among the selected weights. On other steps it
    does not wait for the device.

    Args:
        l1, l2: Strengths, as in `fastreg.elastic_penalty`. At least one is required. They may be assigned later.
        mode, metric: As in `fastreg.ElasticNet.attach`.
        include, exclude: As in `fastreg.elastic_penalty`, for the names of the LightningModule's parameters.

    Raises:
        ValueError: An argument is invalid. When training begins, as in `fastreg.ElasticNet.attach`, or a selected
            weight is in no optimizer.
        TypeError: An argument has the wrong type. When training begins, as in `fastreg.ElasticNet.attach`.

    Examples:
        >>> trainer = Trainer(callbacks=[ElasticNetCallback(l1=1e-6, exclude=fastreg.bias_and_norm)])
    """

    _seen: Sequence[Penalty | None] = ()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the penalty to the optimizers, which exist by now."""
        self._attach(pl_module, trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the terms after a step that Lightning logs."""
        seen, self._seen = self._seen, [reg.last for reg in self._regs]
        stepped = len(seen) != len(self._seen) or not all(map(operator.is_, self._seen, seen))
        # Lightning's own callbacks use this private name. There is no public one.
        if stepped and trainer._logger_connector.should_update_logs:
            same = [callback for callback in trainer.callbacks if isinstance(callback, ElasticNetCallback)]
            pl_module.log_dict(self._metrics(1 + same.index(self)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach the penalty."""
        self.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach the penalty."""
        self.detach()
