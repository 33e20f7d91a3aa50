"""Parameters in the shapes of real models.

model_shapes.json holds names and shapes as the transformers library (5.x) builds its default ResNet-50, MobileNetV2,
ConvNeXt-T, ViT-B/16, BERT-base and GPT-2; Llama-3.2-1B from its published sizes, embeddings tied; and the MNIST MLP of
the article that fastreg grew out of. Values are drawn here: only sizes matter to the cost.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

Shapes = Sequence[Sequence[int]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# By size; those for CPUs fit a run of minutes.
MODELS = ("mnist_mlp", "mobilenet_v2", "resnet50", "convnext_tiny", "vit_b16", "bert_base", "gpt2", "llama3.2_1b")
CPU_MODELS = ("mnist_mlp", "mobilenet_v2", "resnet50", "gpt2")
_STORED = json.loads(Path(__file__).with_name("model_shapes.json").read_text())
SHAPES: dict[str, Shapes] = {model: [shape for _, shape in parameters] for model, parameters in _STORED.items()}


def n_weights(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def from_shapes(shapes: Shapes, dtype: torch.dtype, device: str | torch.device) -> list[nn.Parameter]:
    """Weights like trained ones in scale, without gradients; on the meta device without data."""
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(0)
    values = (torch.randn(list(shape), generator=generator, device=device) for shape in shapes)
    return [nn.Parameter(value.mul_(0.02).to(dtype)) for value in values]
