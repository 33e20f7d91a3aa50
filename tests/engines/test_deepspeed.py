"""DeepSpeed on two CPU processes: fastreg.optim handed to the engine, against the same training in one process.

DeepSpeed builds from source, so this is no part of the engines lane: `make test-deepspeed`.
"""

import gc
import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastreg
from tests.integrations.by_hand import step_by_hand
from tests.support.ranks import Ranks, Teams, by_name, on_processes

pytestmark = [*on_processes, pytest.mark.deepspeed]

WORLD, STEPS = 2, 4
L1, L2, LR = 1e-2, 3e-2, 0.05
STAGES = (0, 1, 2, 3)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def loss_of(model: Any, rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype).unbind()
    return (model(x) - y[:, :3]).square().mean()


def reference(mode: str) -> tuple[nn.Module, list[Any]]:
    model = network().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    noted = []
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(loss_of(model, rank, step, torch.float64) / WORLD for rank in range(WORLD)).backward()  # type: ignore[union-attr]
        noted.append(step_by_hand(list(model.parameters()), optimizer, mode, L1, L2))
    return model, noted


def as_torchrun_does(ranks: Ranks) -> None:
    """Set the environment by which DeepSpeed sees that this process is one of several. Other cases set it, too."""
    os.environ.update(RANK=str(ranks.rank), LOCAL_RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", DS_ACCELERATOR="cpu")


def engine_of(ranks: Ranks, stage: int, optimizer_of: Any, **config: Any) -> tuple[Any, Any]:
    """The engine, and the optimizer that it hands out."""
    as_torchrun_does(ranks)
    import deepspeed

    model = network()
    chosen = {
        "train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, **config,
    }  # fmt: skip
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=chosen)
    return engine, optimizer


def train(engine: Any, rank: int, penalty: Any = None) -> None:
    for step in range(STEPS):
        loss = loss_of(engine, rank, step)
        engine.backward(loss if penalty is None else loss + penalty())
        engine.step()


def assert_same(engine: Any, expected: nn.Module) -> None:
    import deepspeed

    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params):
        for p, q in zip(params, expected.parameters(), strict=True):
            torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=2e-6)
            assert torch.equal(p == 0, q == 0)


def optimizer_of_fastreg(ranks: Ranks) -> None:
    for stage in STAGES:
        for prox in (False, True):
            engine, _ = engine_of(
                ranks, stage, lambda m: fastreg.optim.AdamW(m.parameters(), LR, l1=L1, l2=L2, prox=prox, track=True)  # noqa: B023
            )  # fmt: skip
            train(engine, ranks.rank)
            expected, noted = reference("prox" if prox else "grad")
            assert_same(engine, expected)
            if not prox and stage in (1, 2, 3):
                # Each rank's share. Plain data parallelism has the whole value on every rank.
                last = torch.stack(list(engine.basic_optimizer.last))
                dist.all_reduce(last)
                # ZeRO-3 pads odd shards, and the padding counts.
                assert last[1:].tolist() == pytest.approx([*noted[-1][:2]], rel=1e-5 if stage < 3 else 1e-2)


def optimizer_of_fastreg_with_offload(ranks: Ranks) -> None:
    """With zero_force_ds_cpu_optimizer: false, else DeepSpeed refuses it and Accelerate replaces it."""
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    maker = lambda m: fastreg.optim.AdamW(m.parameters(), LR, l1=L1, l2=L2, prox=True)  # noqa: E731
    engine, _ = engine_of(ranks, 2, maker, **offload)
    train(engine, ranks.rank)
    assert_same(engine, reference("prox")[0])


def attached_penalties_name_fastreg_optim(ranks: Ranks) -> None:
    for stage in STAGES[1:]:
        made: list[Any] = []

        def maker(model: nn.Module, made: list[Any] = made) -> Any:
            made.append(torch.optim.AdamW(model.parameters(), LR))
            return made[0]

        engine, optimizer = engine_of(ranks, stage, maker)
        if stage < 3:
            reg = fastreg.ElasticNet(engine.module, L1, L2)
            for mode in ("grad", "prox"):
                for each, error in ((optimizer, TypeError), (made[0], ValueError)):
                    with pytest.raises(error, match=r"DeepSpeed steps copies of the weights.*fastreg\.optim"):
                        reg.attach(each, mode)


def attached_without_zero(ranks: Ranks) -> None:
    for mode in ("grad", "prox"):
        engine, optimizer = engine_of(ranks, 0, lambda m: torch.optim.AdamW(m.parameters(), LR))
        fastreg.ElasticNet(engine.module, L1, L2).attach(optimizer, mode)
        train(engine, ranks.rank)
        assert_same(engine, reference(mode)[0])


def penalty_in_the_loss(ranks: Ranks) -> None:
    for stage in STAGES[:3]:
        engine, _ = engine_of(ranks, stage, lambda m: torch.optim.AdamW(m.parameters(), LR))
        train(engine, ranks.rank, fastreg.ElasticNet(engine.module, L1, L2))
        expected, _ = reference("grad")
        assert_same(engine, expected)
        value = fastreg.elastic_penalty(engine.module, L1, L2)
        wanted = fastreg.elastic_penalty(expected, L1, L2)
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5)


def placeholders_of_zero_3(ranks: Ranks) -> None:
    """Refused outside of GatheredParameters; inside, the values are those of the whole model."""
    import deepspeed

    engine, _ = engine_of(ranks, 3, lambda m: torch.optim.AdamW(m.parameters(), LR))
    calls: list[Callable[..., Any]] = [fastreg.elastic_penalty, fastreg.add_elastic_grad_, fastreg.ElasticNet]
    for call in (*calls, lambda module, l1: fastreg.sparsity(module)):
        with pytest.raises(RuntimeError, match="GatheredParameters"):
            call(engine.module, L1)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        value = fastreg.elastic_penalty(engine.module, L1, L2)
        assert fastreg.sparsity(engine.module) == 0
    assert value.item() == pytest.approx(fastreg.elastic_penalty(network(), L1, L2).item(), rel=1e-6)


def forget(optimizers: list[Any]) -> None:
    optimizers.clear()
    gc.collect()


def optimizer_that_accelerate_replaces(ranks: Ranks) -> None:
    """As `Accelerator.prepare` does with offload."""
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    optimizers: list[Any] = [fastreg.optim.AdamW(network().parameters(), LR, l1=L1, prox=True)]
    other = map_pytorch_optim_to_deepspeed(optimizers[0])
    assert type(other).__name__ == "DeepSpeedCPUAdam"
    with pytest.warns(UserWarning, match=r"was never stepped.*zero_force_ds_cpu_optimizer: false"):
        forget(optimizers)


def trainer(ranks: Ranks) -> None:
    """Trainer takes `optimizer_cls_and_kwargs`. It drops `optimizers`, and the callback is refused."""
    import transformers
    from accelerate.state import AcceleratorState
    from torch.utils.data import SequentialSampler

    from fastreg.integrations.transformers import ElasticNetCallback
    from tests.integrations.tiny_models import examples, tiny_bert

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    as_torchrun_does(ranks)

    def trainer_of(model: nn.Module, **options: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        config = {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        arguments = transformers.TrainingArguments(
            tempfile.mkdtemp(), use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=4, max_steps=4,
            learning_rate=1e-2, max_grad_norm=0.0, save_strategy="no", report_to="none", disable_tqdm=True,
            deepspeed=config, average_tokens_across_devices=False, lr_scheduler_type="constant",
        )  # fmt: skip
        return InOrder(model, arguments, train_dataset=examples("bert"), **options)

    for mode in ("grad", "prox"):
        with pytest.raises(TypeError, match=r"DeepSpeed steps copies of the weights.*fastreg\.optim"):
            trainer_of(tiny_bert().float(), callbacks=[ElasticNetCallback(L1, L2, mode=mode)]).train()
    kwargs = {"lr": 1e-2, "l1": 2e-3, "l2": L2, "prox": True}
    model = tiny_bert().float()
    dropped = [fastreg.optim.AdamW(model.parameters(), **kwargs)]
    trainer_of(model, optimizers=(dropped[0], None)).train()
    with pytest.warns(UserWarning, match="was never stepped.*Trainer takes optimizer_cls_and_kwargs, not optimizers"):
        forget(dropped)
    model = tiny_bert().float()
    trainer_of(model, optimizer_cls_and_kwargs=(fastreg.optim.AdamW, kwargs)).train()
    expected = tiny_bert()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(4):
        optimizer.zero_grad()
        chosen = examples("bert")[8 * step :][:8]
        expected(**{key: torch.stack([each[key] for each in chosen]) for key in chosen[0]}).loss.backward()
        step_by_hand(list(expected.parameters()), optimizer, "prox", 2e-3, L2)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=2e-6)
    assert fastreg.sparsity(model) == fastreg.sparsity(expected) > 0.1
    AcceleratorState._reset_state(reset_partial_state=True)


CASES = by_name(
    optimizer_of_fastreg,
    optimizer_of_fastreg_with_offload,
    attached_penalties_name_fastreg_optim,
    attached_without_zero,
    penalty_in_the_loss,
    placeholders_of_zero_3,
    optimizer_that_accelerate_replaces,
    trainer,
)


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(teams: Teams, name: str) -> None:
    teams.run(__name__, name, WORLD, ("torch", "cpu"))
