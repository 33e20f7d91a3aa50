"""A callback for the Trainer of Hugging Face's transformers."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastreg.integrations.callback import AttachedElasticNet

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'fastreg.integrations.transformers is for the Trainer of transformers: pip install "transformers[torch]"'
    ) from error


class ElasticNetCallback(AttachedElasticNet, TrainerCallback):
    """Apply the penalty at every optimizer step of a `transformers.Trainer`, once, after any number of micro-batches.

    The gradient is added after gradient clipping, which does not see it, and after the unscaling of mixed precision.
    The logged loss is the data's.

    Each entry of Trainer's log history with a loss also gets `regularization/l1` and `regularization/l2`, the weighted
    terms of the last step, and `regularization/sparsity`, the share of exact zeros among the selected weights. On other
    steps the callback does not wait for the device.

    Args:
        l1, l2: Strengths, as in `fastreg.elastic_penalty`. At least one is required. They may be assigned later.
        mode, metric: As in `fastreg.ElasticNet.attach`.
        include, exclude: As in `fastreg.elastic_penalty`, for the names of the model's parameters.

    Raises:
        ValueError: An argument is invalid. When training begins, as in `fastreg.ElasticNet.attach`.
        TypeError: An argument has the wrong type. When training begins, as in `fastreg.ElasticNet.attach`.

    Examples:
        >>> trainer = Trainer(model, args, callbacks=[ElasticNetCallback(l1=1e-6, exclude=fastreg.bias_and_norm)])
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Optimizer, **others: Any
    ) -> None:
        """Attach the penalty to the optimizer, which Trainer has prepared by now."""
        self._attach(model, [optimizer])

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Optimizer, **others: Any
    ) -> None:
        """Attach the penalty if the callback was added during training."""
        if not self._attachments:
            self._attach(model, [optimizer])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        """Add the terms to the logs of training steps."""
        if logs is None or "loss" not in logs:
            return
        number = 1 + sum(name.startswith("regularization") and name.endswith("/l1") for name in logs)
        metrics = {name: value.item() for name, value in self._metrics(number).items()}
        logs.update(metrics)
        state.log_history[-1].update(metrics)  # it already has a copy of the logs

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Detach the penalty."""
        self.detach()
