"""Train a small transformer, sharded over processes by FSDP2, with an elastic net attached to the optimizer.

    torchrun --standalone --nproc-per-node 2 examples/language_model.py --steps 60
    torchrun --standalone --nproc-per-node 2 examples/language_model.py --steps 120 --resume

The text is Python's own help, `pydoc_data.topics`, byte by byte. Each logged step prints the loss of all processes, its
parts, and the share of weights that are exactly zero. At the end, torch.distributed.checkpoint saves weights and
optimizer state to a folder in `--checkpoint`. `--resume` continues from the last checkpoint, with the same numbers as a
run that never stopped. The number of processes may change in between if it divides the batch size.

`--mode prox` shrinks the weights after each step and leaves exact zeros. `--mode grad` adds the penalty's gradient
before each step. The backend is NCCL with GPUs, else gloo.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastreg

CONTEXT = 64
WIDTH = 64
N_LAYERS = 2
BATCH_SIZE = 32  # of all processes together
LEARNING_RATE = 0.2


class LanguageModel(nn.Module):
    """A model whose output is the mean cross-entropy of each next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(N_LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor, following: Tensor) -> Tensor:  # noqa: D102
        causal = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        x = self.embed(text) + self.position
        for layer in self.layers:
            x = layer(x, src_mask=causal, is_causal=True)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), following.flatten())


def batch(text: Tensor, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return this process's part of a batch. The whole batch is the same for any number of processes."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH_SIZE,), generator=generator)
    own = starts.chunk(dist.get_world_size())[dist.get_rank()]
    windows = torch.stack([text[s : s + CONTEXT + 1] for s in own.tolist()]).to(device)
    return windows[:, :-1], windows[:, 1:]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="the last step (default: %(default)s)")
    parser.add_argument("--l1", type=float, default=5e-4)
    parser.add_argument("--l2", type=float, default=5e-4)
    parser.add_argument("--mode", choices=("prox", "grad"), default="prox", help="of attach (default: %(default)s)")
    parser.add_argument("--log-every", type=int, default=10, help="steps (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=Path("outputs/language_model"), help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train to `options.steps` and save a checkpoint."""
    torch.manual_seed(0)
    model = LanguageModel().to(device)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    # Create it after sharding: it must hold the same parameters as the optimizer.
    reg = fastreg.ElasticNet(model, options.l1, options.l2, exclude=fastreg.bias_and_norm)
    reg.attach(optimizer, mode=options.mode)
    first = 0
    if options.resume:
        first = load(options.checkpoint, model, optimizer)
        if first >= options.steps:
            raise SystemExit(f"the checkpoint is of step {first} already; give --steps a later one")
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    for step in range(first + 1, options.steps + 1):
        x, y = batch(text, step, device)
        optimizer.zero_grad()
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        if step % options.log_every == 0 or step == options.steps:
            mean = loss.detach() / dist.get_world_size()
            dist.all_reduce(mean)
            zeros = fastreg.sparsity(model, exclude=fastreg.bias_and_norm)
            assert reg.last is not None
            log(step, mean, reg.last, zeros)
    save(options.checkpoint, model, optimizer, options.steps)


def log(step: int, cross_entropy: Tensor, penalty: fastreg.Penalty, zeros: Tensor) -> None:
    """Print one line from the first process; the numbers are the same on all."""
    if dist.get_rank() == 0:
        parts = f"cross-entropy {cross_entropy:.6f} + l1 {penalty.l1:.6f} + l2 {penalty.l2:.6f}"
        print(f"step {step:4d}: loss {cross_entropy + penalty.total:.6f} = {parts}, {zeros:.2%} zeros", flush=True)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write this process's shards to a folder named after the step."""
    target = folder / f"step-{step:06d}"
    dcp.save(_state(model, optimizer, step), checkpoint_id=target)
    if dist.get_rank() == 0:
        print(f"saved to {target}")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load this process's shards of the last checkpoint; return its step."""
    saved = sorted(folder.glob("step-*"))
    if not saved:
        raise SystemExit(f"--resume finds no checkpoint in {folder}")
    state = _state(model, optimizer, 0)
    dcp.load(state, checkpoint_id=saved[-1])
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "step": torch.tensor(step)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the processes."""
    options = parse(arguments)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        if BATCH_SIZE % dist.get_world_size():
            raise SystemExit(f"the number of processes must divide {BATCH_SIZE}")
        train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
