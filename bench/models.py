"""Parameters in the shapes of real models.

model_shapes.json holds names and shapes as the transformers library (5.x) builds its default ResNet-50, MobileNetV2,
ConvNeXt-T, ViT-B/16, BERT-base and GPT-2; Llama-3.2-1B from its published sizes, embeddings tied; and the MNIST MLP of
the article that fastreg grew out of. Values are drawn here: only sizes matter to the cost.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

SHAPES: dict[str, list[tuple[str, list[int]]]] = json.loads((Path(__file__).parent / "model_shapes.json").read_text())
# By size.
MODELS = ("mnist_mlp", "mobilenet_v2", "resnet50", "convnext_tiny", "vit_b16", "bert_base", "gpt2", "llama3.2_1b")
# What fits a CPU run of minutes.
CPU_MODELS = ("mnist_mlp", "mobilenet_v2", "resnet50", "gpt2")


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Shapes = Sequence[Sequence[int]]


@functools.cache
def shapes_of(model: str) -> Shapes:
    """The shapes of a model's parameters; the same object at every call."""
    return [shape for _, shape in SHAPES[model]]


def from_shapes(shapes: Shapes, dtype: torch.dtype, device: str | torch.device) -> list[nn.Parameter]:
    """Weights like trained ones in scale, without gradients."""
    if str(device) == "meta":
        return [nn.Parameter(torch.empty(list(shape), dtype=dtype, device="meta")) for shape in shapes]
    generator = torch.Generator(device).manual_seed(0)
    return [
        nn.Parameter(torch.randn(list(shape), generator=generator, device=device).mul_(0.02).to(dtype))
        for shape in shapes
    ]
