"""Every block of code in docs/integrations.md, run in order, with something small to train."""

import re
from pathlib import Path
from typing import Any

import accelerate
import lightning.pytorch as lightning
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg
from tests.integrations.by_hand import add_gradient_by_hand
from tests.integrations.tiny_models import Recorder, examples, tiny_bert

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # of other people's code

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()


def blocks(heading: str) -> list[str]:
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = [each for each in section if each.startswith(f"{heading}\n")]
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found


def run(code: str, namespace: dict[str, Any]) -> None:
    exec(compile(code, "docs/integrations.md", "exec"), namespace)


def batches() -> list[tuple[Tensor, Tensor]]:
    x, y = torch.randn(2, 64, 6, generator=torch.Generator().manual_seed(2)).unbind()
    return list(zip(x.split(8), y.split(8), strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))


def test_trainer(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=8, learning_rate=1e-2, gradient_accumulation_steps=4, logging_steps=4,
        per_device_train_batch_size=4, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    namespace = {"Trainer": transformers.Trainer, "args": args, "dataset": examples("bert")}
    first, reporters, optimizer = blocks("Trainer")
    namespace["model"] = tiny_bert()
    run(first, namespace)
    assert [entry["regularization/sparsity"] > 0.05 for entry in namespace["trainer"].state.log_history[:2]] == [
        True
    ] * 2
    assert fastreg.sparsity(namespace["model"], exclude=r"weight$") < 0.4, "of the biases, which begin with zeros"
    recorder = Recorder()
    namespace["trainer"].add_callback(recorder)
    run(reporters, namespace)
    namespace["trainer"].train()
    assert "regularization/l1" in recorder.logs[0]
    namespace["model"] = tiny_bert()
    run(optimizer, namespace)
    assert fastreg.sparsity(namespace["model"]) > 0.05


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Any] = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = network(), nn.Linear(6, 6)
            trained.append(self)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.head(self.encoder(batch[0])) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    class Trainer(lightning.Trainer):  # type: ignore[misc, name-defined]
        def __init__(self, max_epochs: int, callbacks: Any = ()) -> None:
            super().__init__(
                max_epochs=max_epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, log_every_n_steps=1,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=tmp_path,
            )  # fmt: skip

    x, y = map(torch.cat, zip(*batches(), strict=True))
    namespace = {"torch": torch, "Module": Module, "Trainer": Trainer, "loader": DataLoader(TensorDataset(x, y), 8)}
    namespace["module"] = Module()
    callback, attaching, optimizer = blocks("Lightning")
    run(callback, namespace)
    assert fastreg.sparsity(namespace["module"].encoder) > 0
    assert fastreg.sparsity(namespace["module"].head) == 0
    assert namespace["trainer"].callback_metrics["regularization/sparsity"] > 0
    for code in (attaching, optimizer):
        run(code.replace("l1=1e-3", "l1=1.0").replace("l1=1e-2", "l1=1.0"), namespace)  # there are 16 steps only
        assert fastreg.sparsity(trained[-1].encoder) > 0


def accelerated(micro_batches: int) -> dict[str, Any]:
    model = network()
    return {
        "accelerator": accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": DataLoader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), 8),
        "criterion": nn.MSELoss(),
        "micro_batches": micro_batches,
        "fastreg": fastreg,
    }


def plain_loop(micro_batches: int) -> nn.Module:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches()
    for start in range(0, len(data), micro_batches):
        optimizer.zero_grad()
        for x, y in data[start:][:micro_batches]:
            ((model(x) - y).square().mean() / micro_batches).backward()
        add_gradient_by_hand(model.parameters(), 1e-3, 0.0)
        optimizer.step()
    return model


def assert_close(model: nn.Module, expected: nn.Module) -> None:
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # float32 weights of up to 0.5, in another order


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_accelerate(micro_batches: int) -> None:
    attaching, in_the_loss = blocks("Accelerate")
    namespace = accelerated(micro_batches)
    run(attaching.replace("l1=1e-3", "l1=1.0"), namespace)  # there are few steps
    assert fastreg.sparsity(namespace["model"]) > 0.1
    in_mode_grad = accelerated(micro_batches)
    run(attaching.replace(', mode="prox"', "").replace(", exclude=fastreg.bias_and_norm", ""), in_mode_grad)
    in_loss = accelerated(micro_batches)
    prepared = in_loss["accelerator"].prepare(in_loss["model"], in_loss["optimizer"], in_loss["loader"])
    in_loss["model"], in_loss["optimizer"], in_loss["loader"] = prepared
    run(in_the_loss, in_loss)
    # The recipe clips to a norm of 1, which these gradients stay below.
    for each in (in_mode_grad, in_loss):
        assert_close(each["model"], plain_loop(micro_batches))


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_own_loop(micro_batches: int) -> None:
    namespace = accelerated(micro_batches)
    (loop,) = blocks("Your own loop")
    run(loop, namespace)
    assert_close(namespace["model"], plain_loop(micro_batches))


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_attached_under_accelerates_scaler(mode: Any) -> None:
    """A step with infinite gradients is skipped, with its penalty, and the scale does not reach the penalty."""
    accelerate.Accelerator(cpu=True)
    model, other = network(), network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    fastreg.ElasticNet(model, l1=1e-3).attach(optimizer, mode)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    for i, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        scaler.scale(loss * (float("inf") if i == 3 else 1.0)).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == (i == 3)
        if i == 3:
            continue
        plain.zero_grad()
        (other(x) - y).square().mean().backward()
        if mode == "grad":
            add_gradient_by_hand(other.parameters(), 1e-3, 0.0)
        plain.step()
        if mode == "prox":
            fastreg.elastic_prox_(other, l1=1e-3, lr=0.1)
    assert_close(model, other)
