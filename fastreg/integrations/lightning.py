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
    """Applies the penalty at every optimizer step of a Lightning `Trainer`, once whatever the accumulation.

        >>> trainer = Trainer(callbacks=[ElasticNetCallback(l1=1e-6, exclude=fastreg.bias_and_norm)])

    Works with automatic and manual optimization, and with several optimizers, each of which applies the penalty of its
    own weights. The gradient is added after clipping, which does not see it, and after the scaling of mixed precision.
    On steps that Lightning logs, `regularization/l1` and `regularization/l2`, the weighted terms of the last step, and
    `regularization/sparsity`, the share of exact zeros among the selected weights, are logged; the loss is the data's.
    Nothing waits for the device in between.

    Args:
        l1, l2: strengths, as in `fastreg.elastic_penalty`; may be assigned later.
        mode, metric: as in `fastreg.ElasticNet.attach`.
        include, exclude: as in `fastreg.elastic_penalty`, by the names of the LightningModule's parameters.

    Raises: when it is created, ValueError and TypeError for its own arguments; when training begins, as
    `fastreg.ElasticNet.attach`, and ValueError for a selected weight that is in no optimizer.
    """

    _seen: Sequence[Penalty | None] = ()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches the penalty to the optimizers, which exist by now."""
        self._attach(pl_module, trainer.optimizers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the terms after a step, if Lightning is going to log it."""
        seen, self._seen = self._seen, [reg.last for reg in self._regs]
        stepped = len(seen) != len(self._seen) or not all(map(operator.is_, self._seen, seen))
        # As Lightning's own callbacks ask; there is no public way.
        if stepped and trainer._logger_connector.should_update_logs:
            same = [callback for callback in trainer.callbacks if isinstance(callback, ElasticNetCallback)]
            pl_module.log_dict(self._metrics(1 + same.index(self)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detaches the penalty."""
        self.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detaches the penalty."""
        self.detach()
