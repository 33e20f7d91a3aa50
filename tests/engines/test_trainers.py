"""Training libraries on two processes: the penalty in them, against plain loops in one process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg
from tests.integrations.by_hand import step_by_hand
from tests.support.ranks import AVAILABLE, Case, Ranks, Teams, full, on_processes

pytestmark = [*on_processes, pytest.mark.engines]
if AVAILABLE:
    from torch.distributed.fsdp import fully_shard

WORLD = 2
L1, L2, LR = 1e-2, 3e-2, 0.05
MODES = ("grad", "prox")


@contextmanager
def as_torchrun_does(ranks: Ranks) -> Iterator[None]:
    """The environment by which libraries see that this process is one of several."""
    settings = {
        "RANK": str(ranks.rank), "LOCAL_RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.world),
        "LOCAL_WORLD_SIZE": str(ranks.world), "GROUP_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setitem(os.environ, name, value)
        yield


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def batches() -> list[Tensor]:
    return list(torch.randn(6, 2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))


def lightning_with_fsdp2(ranks: Ranks) -> None:
    """Lightning evaluates before the first step and after each epoch, which leaves FSDP2's root gathered."""
    import lightning.pytorch as lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    from fastreg.integrations.lightning import ElasticNetCallback

    class Regression(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def configure_model(self) -> None:
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return (self.net(x) - y).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=LR)

    x, y = torch.cat(batches(), 1).unbind()
    loader = DataLoader(TensorDataset(x, y), 8)
    for mode in MODES:
        callback = ElasticNetCallback(L1, L2, mode=mode, exclude=fastreg.bias_and_norm)
        with as_torchrun_does(ranks):
            trainer = lightning.Trainer(
                accelerator="cpu", devices=ranks.world, strategy=ModelParallelStrategy(ranks.world, 1), max_epochs=2,
                callbacks=[callback], log_every_n_steps=1, use_distributed_sampler=False, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            model = Regression()
            trainer.fit(model, loader, loader)
        reference = network()
        optimizer = torch.optim.AdamW(reference.parameters(), lr=LR)
        for batch in batches() * 2:
            optimizer.zero_grad()
            (reference(batch[0]) - batch[1]).square().mean().backward()
            l1, l2, zeros = step_by_hand([p for p in reference.parameters() if p.ndim > 1], optimizer, mode, L1, L2)
        assert_same(model.net, reference)
        found = [trainer.callback_metrics[f"regularization/{name}"].item() for name in ("l1", "l2", "sparsity")]
        assert found == pytest.approx([l1, l2, zeros], rel=1e-6)
        assert callback.last is not None
        assert callback.last.l1.item() == pytest.approx(l1, rel=1e-12)


def assert_same(net: nn.Module, expected: nn.Module) -> None:
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(p), q, rtol=0, atol=1e-12)
        assert torch.equal(full(p) == 0, q == 0)


CASES: dict[str, Case] = {case.__name__: case for case in (lightning_with_fsdp2,)}


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(teams: Teams, name: str) -> None:
    teams.run(__name__, name, WORLD, ("torch", "cpu"))
