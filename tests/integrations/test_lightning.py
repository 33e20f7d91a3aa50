"""`attach`, `ElasticNetCallback` and fastreg.optim in Lightning, against a loop with the penalty's gradient by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import pytorch_lightning as older
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg
from fastreg.integrations.callback import AttachedPenalty
from fastreg.integrations.lightning import ElasticNetCallback
from tests.integrations.by_hand import step_by_hand

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # of other people's code

L1, L2 = 1e-2, 3e-2
BATCHES, BATCH, LR = 12, 8, 0.05
MODES = ["grad", "prox"]
Maker = Callable[..., torch.optim.Optimizer]


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(2, BATCHES * BATCH, 5, generator=torch.Generator().manual_seed(3)).unbind()


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))


class Regression(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Trained automatically."""

    def __init__(self, maker: Maker = torch.optim.AdamW) -> None:
        super().__init__()
        self.net, self.maker = network(), maker

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return self.maker(self.parameters(), lr=LR)


class ByHand(Regression):
    """Trained with manual optimization, with one optimizer for each layer."""

    def __init__(self, maker: Maker = torch.optim.AdamW) -> None:
        super().__init__(maker)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.maker(self.net[i].parameters(), lr=LR) for i in (0, 2)]


class Attaching(Regression):
    """Attaches the penalty itself."""

    mode: Any = "grad"

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        self.reg = fastreg.ElasticNet(self.net, L1, L2, exclude=fastreg.bias_and_norm)
        self.reg.attach(optimizer, self.mode)
        return optimizer


class AttachingByHand(ByHand):
    """Attaches the penalties itself, once to Lightning's wrappers."""

    mode: Any = "grad"

    def configure_optimizers(self) -> Any:
        return [self.maker(self.net[i].parameters(), lr=LR) for i in (0, 2)]

    def on_train_start(self) -> None:
        for i, optimizer in zip((0, 2), self.optimizers(), strict=True):
            fastreg.ElasticNet(self.net[i], L1, L2, exclude=fastreg.bias_and_norm).attach(optimizer, self.mode)


class Noting(Logger):  # type: ignore[misc]
    """Keeps what is logged."""

    name, version = "noting", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.logged.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(model: Any, folder: Path, callback: Any = None, checkpoint: str | None = None, **options: Any) -> Any:
    chosen = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "precision": "64-true", "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "default_root_dir": folder, "log_every_n_steps": 3, **options,
    }  # fmt: skip
    if "plugins" in chosen:
        del chosen["precision"]
    trainer = lightning.Trainer(callbacks=callback, **chosen)
    dtype = torch.float64 if chosen.get("precision") == "64-true" else torch.float32
    loader = DataLoader(TensorDataset(*(each.to(dtype) for each in data())), BATCH)
    trainer.fit(model, loader, ckpt_path=checkpoint)
    return trainer


def matrices(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.ndim >= 2]


def plain_loop(
    mode: str, accumulation: int = 1, clip: float = 0.0, autocast: bool = False, maker: Maker = torch.optim.AdamW
) -> tuple[nn.Module, list[tuple[float, float, float]]]:
    dtype = torch.float32 if autocast else torch.float64
    net = network().to(dtype)
    optimizer = maker(net.parameters(), lr=LR)
    batches = [(x.to(dtype), y.to(dtype)) for x, y in zip(*(each.split(BATCH) for each in data()), strict=True)]
    logged = []
    for step in range(BATCHES // accumulation):
        optimizer.zero_grad()
        for x, y in batches[step * accumulation :][:accumulation]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (net(x) - y).square().mean()
            (loss / accumulation).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        logged.append(step_by_hand(matrices(net), optimizer, mode, L1, L2))
    return net, logged


def assert_same(net: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max().item() <= tolerance
        assert torch.equal(p == 0, q == 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_automatic_optimization(accumulation: int, clip: float, mode: Any, tmp_path: Path) -> None:
    model, logger = Regression(), Noting()
    callback = ElasticNetCallback(L1, L2, mode=mode, exclude=fastreg.bias_and_norm)
    options = {"accumulate_grad_batches": accumulation, "gradient_clip_val": clip or None}
    fit(model, tmp_path, callback, logger=logger, **options)
    expected, logged = plain_loop(mode, accumulation, clip)
    assert_same(model.net, expected)
    assert (fastreg.sparsity(model) > 0) == (mode == "prox")
    assert sorted(logger.logged) == list(range(2, BATCHES // accumulation, 3)), "every third step"
    for step, metrics in logger.logged.items():
        found = [metrics[f"regularization/{each}"] for each in ("l1", "l2", "sparsity")]
        # Lightning keeps metrics in float32.
        assert found == pytest.approx(logged[step], rel=1e-6)
    assert callback.last is not None
    assert callback.last.l1.item() == pytest.approx(logged[-1][0], rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_manual_optimization_with_an_optimizer_for_each_layer(mode: Any, tmp_path: Path) -> None:
    model, logger = ByHand(), Noting()
    callback = ElasticNetCallback(L1, L2, mode=mode, exclude=fastreg.bias_and_norm)
    fit(model, tmp_path, callback, logger=logger)
    expected, logged = plain_loop(mode)
    assert_same(model.net, expected)
    assert sorted(logger.logged) == [2, 5, 8, 11]
    for step, metrics in logger.logged.items():
        found = [metrics[f"regularization/{each}"] for each in ("l1", "l2", "sparsity")]
        assert found == pytest.approx(logged[step], rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Attaching, AttachingByHand])
def test_attach_in_the_module_itself(kind: Any, mode: Any, tmp_path: Path) -> None:
    model = kind()
    model.mode = mode
    fit(model, tmp_path)
    assert_same(model.net, plain_loop(mode)[0])


@pytest.mark.parametrize("mode", MODES)
def test_bf16_autocast(mode: Any, tmp_path: Path) -> None:
    model = Regression(torch.optim.SGD)
    callback = ElasticNetCallback(L1, L2, mode=mode, exclude=fastreg.bias_and_norm)
    fit(model, tmp_path, callback, precision="bf16-mixed", gradient_clip_val=0.5)
    # The same operations, but for the order of a sum here and there, on float32 weights of up to 0.5.
    assert_same(model.net, plain_loop(mode, clip=0.5, autocast=True, maker=torch.optim.SGD)[0], 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_scaled_fp16(mode: Any, tmp_path: Path) -> None:
    """With a scaler, which Lightning runs the closure outside of the optimizer for; the scale is a power of two."""

    def trained(scale: float, callback: Any) -> nn.Module:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        model = Regression(torch.optim.SGD)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        fit(model, tmp_path, callback, plugins=[plugin], gradient_clip_val=0.5)
        return model.net

    with_penalty = [trained(s, ElasticNetCallback(L1, L2, mode=mode)) for s in (1.0, 1024.0)]
    assert_same(*with_penalty, tolerance=1e-4)  # fp16 rounds small gradients differently in other scales
    without = trained(1024.0, None)
    effect = max(
        (p - q).abs().max().item() for p, q in zip(with_penalty[1].parameters(), without.parameters(), strict=True)
    )
    assert effect > 1e-2


@pytest.mark.parametrize("kind", ["compiled", "ddp"])
def test_wrapped_models(kind: str, tmp_path: Path) -> None:
    model = Regression()
    callback = ElasticNetCallback(L1, L2, include=r"^net\.", exclude=fastreg.bias_and_norm)
    if kind == "compiled":
        fit(torch.compile(model, backend="eager"), tmp_path, callback)
    else:
        fit(model, tmp_path, callback, strategy="ddp", use_distributed_sampler=False)
    assert_same(model.net, plain_loop("grad")[0])


@pytest.mark.parametrize("mode", MODES)
def test_resuming_gives_the_same_bits(mode: Any, tmp_path: Path) -> None:
    def trained(checkpoint: str | None = None, **options: Any) -> tuple[nn.Module, Any]:
        model = Regression()
        # Not in float64: Lightning reads checkpoints into the float32 weights that a module begins with.
        callback = ElasticNetCallback(L1, L2, mode=mode)
        return model, fit(model, tmp_path, callback, checkpoint, precision="32-true", **options)

    whole, _ = trained(max_epochs=2)
    _, half_way = trained(enable_checkpointing=True)
    half_way.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = trained(str(tmp_path / "half.ckpt"), max_epochs=2)
    assert_same(whole.net, resumed.net, 0.0)


def test_terms_are_measured_only_on_steps_that_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, measured = [], AttachedPenalty._metrics

    class Counting(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.batch_idx = batch_idx
            return super().training_step(batch, batch_idx)

    model = Counting()

    def noted(self: AttachedPenalty, number: int) -> dict[str, Tensor]:
        batches.append(model.batch_idx)
        return measured(self, number)

    monkeypatch.setattr(AttachedPenalty, "_metrics", noted)
    fit(model, tmp_path, ElasticNetCallback(L1, L2), accumulate_grad_batches=2, logger=Noting())
    assert batches == [5, 11]


@pytest.mark.parametrize("prox", [False, True])
def test_optimizer_of_fastreg(prox: bool, tmp_path: Path) -> None:
    def maker(params: Any, lr: float) -> torch.optim.Optimizer:
        return fastreg.optim.AdamW(params, lr=lr, l1=L1, l2=L2, prox=prox)

    for kind in (Regression, ByHand):
        model, other = kind(maker), kind()
        fit(model, tmp_path)
        fit(other, tmp_path, ElasticNetCallback(L1, L2, mode="prox" if prox else "grad"))
        assert_same(model.net, other.net)
        assert (fastreg.sparsity(model) > 0) == prox


class Finetuning(lightning.callbacks.BaseFinetuning):  # type: ignore[misc, name-defined]
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def test_weights_that_are_thawed_count_from_then_on(tmp_path: Path) -> None:
    class Partly(Regression):
        def configure_optimizers(self) -> Any:
            return self.maker([p for p in self.parameters() if p.requires_grad], lr=LR)

    model, callback = Partly(torch.optim.SGD), ElasticNetCallback(0.1, mode="prox")
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[Finetuning(), callback], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(*data()), BATCH))
    assert fastreg.sparsity(model.net[0]) > 0
    assert fastreg.sparsity(model.net[2]) > 0


def test_interrupted_training_leaves_nothing_attached(tmp_path: Path) -> None:
    class Broken(Regression):
        broken = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3 and self.broken:
                raise KeyError("data")
            return super().training_step(batch, batch_idx)

    model, callback = Broken(), ElasticNetCallback(L1, L2, exclude=fastreg.bias_and_norm)
    with pytest.raises(KeyError):
        fit(model, tmp_path, callback)
    assert not callback._attachments
    model.broken = False
    model.net.load_state_dict(network().state_dict())
    fit(model, tmp_path, callback)
    assert_same(model.net, plain_loop("grad")[0])


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="l2 must be finite and at least 0"):
        ElasticNetCallback(l2=float("nan"))
    with pytest.raises(ValueError, match=r"did you mean 'net\.0\.weight'"):
        fit(Regression(), tmp_path, ElasticNetCallback(L1, include=r"^network\.0\.weight"))
    with pytest.raises(TypeError, match="LBFGS evaluates its closure's loss several times"):
        fit(Regression(torch.optim.LBFGS), tmp_path, ElasticNetCallback(L1))

    class OneOnly(ByHand):
        def configure_optimizers(self) -> Any:
            return [self.maker([p], lr=LR) for p in self.net[0].parameters()]

    with pytest.raises(ValueError, match=r"'net\.2\.weight' is in none of the 2 optimizers; exclude it"):
        fit(OneOnly(), tmp_path, ElasticNetCallback(L1))
    fit(OneOnly(), tmp_path, ElasticNetCallback(L1, include=r"net\.0\.weight"))


def test_the_older_package_name(tmp_path: Path) -> None:
    class Older(older.LightningModule):  # type: ignore[misc, name-defined]
        __init__, training_step = Regression.__init__, Regression.training_step
        configure_optimizers = Regression.configure_optimizers

    model = older.LightningModule.__new__(Older)
    older.LightningModule.__init__(model)
    model.net, model.maker = network().double(), torch.optim.AdamW
    callback = ElasticNetCallback(L1, L2, exclude=fastreg.bias_and_norm)
    trainer = older.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[callback], default_root_dir=tmp_path, precision="64-true",
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(*(each.double() for each in data())), BATCH))
    assert_same(model.net, plain_loop("grad")[0])


def test_two_callbacks_log_beside_each_other(tmp_path: Path) -> None:
    logger = Noting()
    second = ElasticNetCallback(l1=L1, include=r"net\.2")
    model = Regression()
    trainer_options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1}
    first = ElasticNetCallback(L1, L2, include=r"net\.0")
    fit(model, tmp_path, [first, second], **trainer_options)
    last = logger.logged[BATCHES - 1]
    assert last["regularization/l1"] == pytest.approx(first.last.l1.item(), rel=1e-6)  # type: ignore[union-attr]
    assert last["regularization_2/l1"] == pytest.approx(second.last.l1.item(), rel=1e-6)  # type: ignore[union-attr]
    assert last["regularization/l2"] > last["regularization_2/l2"] == 0
