"""Training libraries on two processes: the penalty in them, against plain loops in one process."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastreg
from tests.integrations.by_hand import step_by_hand
from tests.support.ranks import AVAILABLE, Ranks, Teams, by_name, full, on_processes

pytestmark = [*on_processes, pytest.mark.engines]
if AVAILABLE:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

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


def trainer_under_ddp(ranks: Ranks) -> None:
    """Each rank has half of a batch."""
    import transformers
    from accelerate.state import AcceleratorState
    from torch.utils.data import SequentialSampler

    from fastreg.integrations.transformers import ElasticNetCallback
    from tests.integrations.tiny_models import examples, tiny_bert

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    for mode in MODES:
        AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier training in this process
        with as_torchrun_does(ranks), TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                folder, use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=4, max_steps=4, logging_steps=1,
                learning_rate=1e-2, max_grad_norm=0.0, save_strategy="no", report_to="none", disable_tqdm=True,
                average_tokens_across_devices=False,  # which would multiply this model's loss by the number of ranks
            )  # fmt: skip
            callback = ElasticNetCallback(2e-3, L1, mode=mode, exclude=fastreg.bias_and_norm)
            trainer = InOrder(tiny_bert(), arguments, train_dataset=examples("bert"), callbacks=[callback])
            trainer.train()
        assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
        expected = tiny_bert()
        optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.0)
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        for step, entry in enumerate(logs):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 4)
            optimizer.zero_grad()
            chosen = examples("bert")[8 * step :][:8]
            expected(**{key: torch.stack([each[key] for each in chosen]) for key in chosen[0]}).loss.backward()
            terms = step_by_hand([p for p in expected.parameters() if p.ndim > 1], optimizer, mode, 2e-3, L1)
            found = [entry[f"regularization/{name}"] for name in ("l1", "l2", "sparsity")]
            assert found == pytest.approx(terms, rel=1e-6)
        assert len(logs) == 4
        assert_same(trainer.model, expected)
    AcceleratorState._reset_state(reset_partial_state=True)


def tensor_parallel_by_a_plan(ranks: Ranks) -> None:
    """transformers shares the matrices among ranks and leaves other weights plain, the same on every rank."""
    import transformers
    from transformers.distributed import DistributedConfig

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, dtype=torch.float64,
    )  # fmt: skip
    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(config).double()
    with TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)  # rank 0 saves
        original.save_pretrained(folders[0])
        dist.barrier()
        with as_torchrun_does(ranks):
            sharding = {"distributed_config": DistributedConfig(tp_plan="auto"), "device_mesh": ranks.mesh()}
            shared = [
                transformers.LlamaForCausalLM.from_pretrained(folders[0], dtype=torch.float64, **sharding)
                for _ in MODES
            ]
        dist.barrier()
    assert {type(p) for p in shared[0].parameters()} == {DTensor, nn.Parameter}
    ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(2))
    for mode, model in zip(MODES, shared, strict=True):
        expected = copy.deepcopy(original)
        last = []
        for each in (model, expected):
            optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2, foreach=False)
            reg = fastreg.ElasticNet(each, L1, L2, exclude=fastreg.bias_and_norm)
            reg.attach(optimizer, mode=mode)
            for _ in range(3):
                optimizer.zero_grad()
                each(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            assert reg.last is not None
            last.append(reg.last.total.item())
        assert_same(model, expected, 1e-9)  # another order of sums, through attention
        assert last[0] == pytest.approx(last[1], rel=1e-10)
        found, wanted = (fastreg.sparsity(each, exclude=fastreg.bias_and_norm).item() for each in (model, expected))
        assert (found > 0) == (mode == "prox")
        assert found == wanted


def assert_same(net: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    for p, q in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(p), q, rtol=0, atol=tolerance)
        assert torch.equal(full(p) == 0, q == 0)


CASES = by_name(lightning_with_fsdp2, trainer_under_ddp, tensor_parallel_by_a_plan)


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(teams: Teams, name: str) -> None:
    teams.run(__name__, name, WORLD, ("torch", "cpu"))
