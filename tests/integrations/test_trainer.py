"""`ElasticNetCallback` in the Trainer of transformers, against a loop with the penalty's gradient written out."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

import fastreg
from fastreg.integrations.callback import AttachedPenalty
from fastreg.integrations.transformers import ElasticNetCallback
from tests.integrations.by_hand import step_by_hand
from tests.integrations.tiny_models import MODELS, Recorder, examples, tiny_bert

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]  # of other people's code

L1, L2 = 2e-3, 1e-2
BATCH, STEPS, LR = 4, 6, 1e-2


class InOrder(transformers.Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer_for(name: str, folder: Path, callback: Any, model: nn.Module | None = None, **options: Any) -> Any:
    optimizer = options.pop("optimizer_cls_and_kwargs", None)
    optimizers = options.pop("optimizers", (None, None))
    chosen = {
        "use_cpu": True, "per_device_train_batch_size": BATCH, "max_steps": STEPS, "learning_rate": LR,
        "max_grad_norm": 0.0, "weight_decay": 0.01, "lr_scheduler_type": "linear", "logging_steps": 2,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    return InOrder(
        MODELS[name]() if model is None else model,
        transformers.TrainingArguments(str(folder), **chosen),
        train_dataset=examples(name),
        callbacks=[callback] if callback else [],
        optimizer_cls_and_kwargs=optimizer,
        optimizers=optimizers,
    )


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim >= 2]


def plain_loop(
    name: str,
    mode: str,
    accumulation: int = 1,
    clip: float = 0.0,
    autocast: bool = False,
    maker: Callable[..., Any] = torch.optim.AdamW,
) -> tuple[nn.Module, list[tuple[float, float, float]]]:
    """As Trainer trains by default, with AdamW and no decay of biases, and the penalty of the matrices by hand."""
    model = MODELS[name]()
    model = (model.float() if autocast else model).train()
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices(model), "weight_decay": 0.01}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = maker(groups, lr=LR)
    data, logged = examples(name), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (1 - step / STEPS)
        optimizer.zero_grad()
        for i in range(accumulation):
            start = (step * accumulation + i) * BATCH % len(data)
            batch = {key: torch.stack([each[key] for each in data[start:][:BATCH]]) for key in data[0]}
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            (loss if name == "bert" else loss / accumulation).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        logged.append(step_by_hand(matrices(model), optimizer, mode, L1, L2))
    return model, logged


def distance(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_a_plain_loop(name: str, accumulation: int, clip: float, mode: Any, tmp_path: Path) -> None:
    callback = ElasticNetCallback(L1, L2, mode=mode, exclude=fastreg.bias_and_norm)
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip}
    trainer = trainer_for(name, tmp_path, callback, **options)
    trainer.train()
    expected, logged = plain_loop(name, mode, accumulation, clip)
    # float64, and AdamW enlarges rounding where gradients are small; the penalty moves weights by 1e-2.
    assert distance(trainer.model, expected) < 1e-9
    zeros = [[(p == 0).tolist() for p in matrices(model)] for model in (trainer.model, expected)]
    assert zeros[0] == zeros[1]
    assert (logged[-1][2] > 0.1) == (mode == "prox")
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in log] == [2, 4, 6]
    for entry in log:
        found = [entry[f"regularization/{each}"] for each in ("l1", "l2", "sparsity")]
        assert all(type(each) is float for each in found)  # which go into JSON
        assert found == pytest.approx(logged[entry["step"] - 1], rel=1e-6)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_bf16_autocast(mode: Any, tmp_path: Path) -> None:
    options = {"bf16": True, "optim": "sgd", "max_grad_norm": 0.05}
    callback = ElasticNetCallback(L1, L2, mode=mode, exclude=fastreg.bias_and_norm)
    trainer = trainer_for("bert", tmp_path, callback, tiny_bert().float(), **options)
    trainer.train()
    without = trainer_for("bert", tmp_path, None, tiny_bert().float(), **options)
    without.train()
    expected, _ = plain_loop("bert", mode, clip=0.05, autocast=True, maker=torch.optim.SGD)
    # The same operations on float32 weights of about 0.1, but for the order of a sum here and there.
    assert distance(trainer.model, expected) < 1e-7
    assert distance(trainer.model, without.model) > 1e-5


def test_resuming_gives_the_same_bits(tmp_path: Path) -> None:
    for mode in ("grad", "prox"):
        options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
        folder = tmp_path / mode
        make = lambda: ElasticNetCallback(L1, L2, mode=mode)  # noqa: B023, E731
        whole = trainer_for("bert", folder, make(), **options)
        whole.train()
        resumed = trainer_for("bert", folder, make(), **options)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        assert resumed.state.global_step == STEPS
        assert distance(whole.model, resumed.model) == 0
        keys = ("step", "loss", "regularization/l1", "regularization/l2", "regularization/sparsity")
        last = [[entry.get(key) for key in keys] for t in (whole, resumed) for entry in t.state.log_history[-2:-1]]
        assert last[0] == last[1]


def test_compiled_by_trainer(tmp_path: Path) -> None:
    callback = ElasticNetCallback(L1, L2, mode="prox", include=r"^bert\.", exclude=fastreg.bias_and_norm)
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = trainer_for("bert", tmp_path, callback, **options)
    compiled.train()
    eager = trainer_for("bert", tmp_path, copy.copy(callback))
    eager.train()
    assert distance(compiled.model, eager.model) < 1e-9


def test_terms_are_measured_only_where_the_loss_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, measured = [], AttachedPenalty._metrics
    callback = ElasticNetCallback(L1, L2)
    trainer = trainer_for("bert", tmp_path, callback, logging_steps=3)

    def noted(self: AttachedPenalty, number: int) -> dict[str, Tensor]:
        steps.append(trainer.state.global_step)
        return measured(self, number)

    monkeypatch.setattr(AttachedPenalty, "_metrics", noted)
    trainer.train()
    assert steps == [3, 6]
    summary = trainer.state.log_history[-1]
    assert "train_loss" in summary
    assert "regularization/l1" not in summary


def test_reporters_behind_the_callback_get_the_terms(tmp_path: Path) -> None:
    callback, recorder = ElasticNetCallback(L1, L2), Recorder()
    trainer = trainer_for("bert", tmp_path, recorder)
    trainer.callback_handler.callbacks.insert(0, callback)
    trainer.train()
    assert "regularization/l1" in recorder.logs[0]


def test_a_schedule_of_the_strengths(tmp_path: Path) -> None:
    class WarmUp(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            penalty.l1, penalty.l2 = (L1, L2) if state.global_step >= 2 else (0.0, 0.0)

    penalty = ElasticNetCallback(0.0, 0.0)
    trainer = trainer_for("bert", tmp_path, penalty, logging_steps=1)
    trainer.add_callback(WarmUp())
    trainer.train()
    for name in ("regularization/l1", "regularization/l2"):
        terms = [entry[name] for entry in trainer.state.log_history if "loss" in entry]
        assert terms[:2] == [0.0, 0.0]
        assert all(term > 0 for term in terms[2:])


def test_training_again_and_after_an_interruption(tmp_path: Path) -> None:
    class Interrupting(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise KeyboardInterrupt

    callback, model = ElasticNetCallback(L1, L2), tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)  # the same one in every training
    trainer = trainer_for("bert", tmp_path, callback, model, optimizers=(optimizer, None))
    trainer.add_callback(Interrupting())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupting)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="another penalty")
        trainer.train()
        trainer.train()
    assert callback.last is not None
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = LR  # the schedule ended at 0
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("prox", [False, True])
def test_optimizer_of_fastreg(prox: bool, tmp_path: Path) -> None:
    keywords = {"lr": LR, "l1": L1, "l2": L2, "prox": prox}
    # All groups get l1 and l2: here biases too.
    trainer = trainer_for("bert", tmp_path, None, optimizer_cls_and_kwargs=(fastreg.optim.AdamW, keywords))
    trainer.train()
    attached = ElasticNetCallback(L1, L2, mode="prox" if prox else "grad")
    expected = trainer_for("bert", tmp_path, attached)
    expected.train()
    assert distance(trainer.model, expected.model) < 1e-9
    assert (fastreg.sparsity(trainer.model) > 0.1) == prox


def test_optimizer_of_fastreg_resumes(tmp_path: Path) -> None:
    options = {
        "save_strategy": "steps",
        "save_steps": 3,
        "optimizer_cls_and_kwargs": (fastreg.optim.AdamW, {"lr": LR, "l1": L1, "prox": True}),
    }
    whole = trainer_for("bert", tmp_path, None, **options)
    whole.train()
    resumed = trainer_for("bert", tmp_path, None, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert distance(whole.model, resumed.model) == 0


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="l1 must be finite and at least 0"):
        ElasticNetCallback(-1.0)
    with pytest.raises(ValueError, match='mode must be "grad" or "prox"'):
        ElasticNetCallback(L1, mode="gradient")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='metric must be "optimizer" or "lr"'):
        ElasticNetCallback(L1, mode="prox", metric="adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="metric is for"):
        ElasticNetCallback(L1, metric="lr")
    with pytest.raises(TypeError, match=r"ElasticNetCallback\.__init__\(\) got an unexpected keyword argument 'L1'"):
        ElasticNetCallback(L1=L1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="needs l1 or l2"):
        trainer_for("bert", tmp_path, ElasticNetCallback)  # the class, which would have no strengths
    for name in ("include", "exclude"):
        with pytest.raises(ValueError, match=f"{name} is not a valid regular expression"):
            ElasticNetCallback(L1, **{name: "("})
        with pytest.raises(TypeError, match=f"{name} must be a regular expression"):
            ElasticNetCallback(L1, **{name: ["bert"]})
    trainer = trainer_for("bert", tmp_path, ElasticNetCallback(L1, include="atention"))
    with pytest.raises(ValueError, match=r"matches none .* did you mean 'bert\.encoder\.layer\.0\.attention"):
        trainer.train()
    trainer = trainer_for("bert", tmp_path, ElasticNetCallback(L1, mode="prox"), optim="adafactor")
    with pytest.raises(ValueError, match="the step size of Adafactor is not known"):
        trainer.train()
    by_lr = ElasticNetCallback(L1, mode="prox", metric="lr")
    trainer = trainer_for("bert", tmp_path, by_lr, optim="adafactor", logging_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["regularization/l1"] > 0


def test_penalty_in_the_loss_counts_once_for_each_micro_batch(tmp_path: Path) -> None:
    """What the callback is for: as the documentation warns."""

    class InTheLoss(InOrder):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **kwargs) + fastreg.elastic_penalty(model, L1, L2)

    def trained(l1: float, l2: float) -> nn.Module:
        trainer = trainer_for("bert", tmp_path, ElasticNetCallback(l1, l2), gradient_accumulation_steps=4)
        trainer.train()
        return trainer.model  # type: ignore[no-any-return]

    in_the_loss = trainer_for("bert", tmp_path, None, gradient_accumulation_steps=4)
    in_the_loss.__class__ = InTheLoss
    in_the_loss.train()
    assert distance(in_the_loss.model, trained(4 * L1, 4 * L2)) < 1e-9
    assert distance(in_the_loss.model, trained(L1, L2)) > 1e-3
    assert not math.isnan(distance(in_the_loss.model, trained(L1, L2)))


def test_two_callbacks_log_beside_each_other(tmp_path: Path) -> None:
    first = ElasticNetCallback(L1, L2, include=r"encoder.*weight$", exclude=fastreg.bias_and_norm)
    second = ElasticNetCallback(l1=L1, include=r"classifier")
    trainer = trainer_for("bert", tmp_path, first, logging_steps=1)
    trainer.add_callback(second)
    trainer.train()
    log = trainer.state.log_history[-2]
    assert log["regularization/l1"] == pytest.approx(first.last.l1.item())  # type: ignore[union-attr]
    assert log["regularization_2/l1"] == pytest.approx(second.last.l1.item())  # type: ignore[union-attr]
    assert log["regularization/l2"] > log["regularization_2/l2"] == 0


def test_a_callback_that_is_added_while_training_is_under_way(tmp_path: Path) -> None:
    class Adding(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                trainer.add_callback(ElasticNetCallback(L1, mode="prox"))

    trainer = trainer_for("bert", tmp_path, Adding(), logging_steps=1)
    trainer.train()
    logged = ["regularization/l1" in entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [False, False, True, True, True, True]
    assert fastreg.sparsity(trainer.model) > 0.01


def test_pickled_in_the_middle_of_training(tmp_path: Path) -> None:
    copies: list[ElasticNetCallback] = []

    class Pickling(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            copies.append(pickle.loads(pickle.dumps(callback)))

    callback = ElasticNetCallback(L1, L2)
    trainer = trainer_for("bert", tmp_path, callback)
    trainer.add_callback(Pickling())
    trainer.train()
    assert copies[-1].l1 == L1
    assert copies[-1].last == callback.last
    assert not copies[-1]._attachments
