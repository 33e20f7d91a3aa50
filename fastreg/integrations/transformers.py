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
    """Applies the penalty at every optimizer step of a `transformers.Trainer`, once whatever the accumulation.

        >>> trainer = Trainer(model, args, callbacks=[ElasticNetCallback(l1=1e-6, exclude=fastreg.bias_and_norm)])

    The gradient is added after clipping, which does not see it, and after the scaling of mixed precision. Trainer's
    log history gets `regularization/l1` and `regularization/l2`, the weighted terms of the last step, and
    `regularization/sparsity`, the share of exact zeros among the selected weights, wherever it gets the loss; the loss
    itself is the data's. Nothing waits for the device in between.

    Args:
        l1, l2: strengths, as in `fastreg.elastic_penalty`; may be assigned later.
        mode, metric: as in `fastreg.ElasticNet.attach`.
        include, exclude: as in `fastreg.elastic_penalty`, by the names of the model's parameters.

    Raises: when it is created, ValueError and TypeError for its own arguments; when training begins, as
    `fastreg.ElasticNet.attach`.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Optimizer, **others: Any
    ) -> None:
        """Attaches the penalty to the optimizer, which Trainer has prepared by now."""
        self._attach(model, [optimizer])

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Optimizer, **others: Any
    ) -> None:
        """Attaches the penalty if this was added while training was under way."""
        if not self._attachments:
            self._attach(model, [optimizer])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        """Adds the terms to what Trainer logs of training steps."""
        if logs is None or "loss" not in logs:
            return
        number = 1 + sum(name.startswith("regularization") and name.endswith("/l1") for name in logs)
        metrics = {name: value.item() for name, value in self._metrics(number).items()}
        logs.update(metrics)
        state.log_history[-1].update(metrics)  # which holds a copy of the logs already

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Detaches the penalty."""
        self.detach()
