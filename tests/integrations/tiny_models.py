"""Transformers small enough to train in a test, something to train them on, and a reporter."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

IDS = torch.randint(0, 32, (96, 8), generator=torch.Generator().manual_seed(1))


def tiny_bert() -> nn.Module:
    """Trainer leaves its loss undivided, so that the micro-batches' gradients add up."""
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).double()


def tiny_gpt2() -> nn.Module:
    """Trainer divides its loss by the number of tokens in all micro-batches. Its embeddings are tied."""
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).double()


MODELS = {"bert": tiny_bert, "gpt2": tiny_gpt2}


def examples(name: str) -> list[dict[str, Tensor]]:
    if name == "bert":
        return [{"input_ids": ids, "labels": ids.sum() % 2} for ids in IDS]
    # Nothing predicts the first token, but Trainer would count it.
    return [{"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])} for ids in IDS]


class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
    """Like a reporter of TensorBoard or Weights & Biases."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs))
