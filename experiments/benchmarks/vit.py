"""ViT-B/16: a forward pass and a training step (AdamW), ours against transformers on PyTorch, on CPU.

    python -m experiments.benchmarks.vit --rounds 5

Batch 8, 224 px, float32, random weights, as many threads for PyTorch as the process may use. Our step is the library's
own `train_step` under its `jit` lift, with its checks for finite updates; the other side's is forward, backward and
torch's AdamW. The sides alternate, so that a change in the machine's load meets both; only ratios mean anything.
"""

import argparse
import dataclasses
import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.convolution import alternate, ratio
from mmjax.models.vit.network import ViT, ViTConfig
from mmjax.training.lift import JitLift
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

Timed = Callable[[], Any]
CLASSES = 1000
RATE, DECAY = 1e-4, 0.05


@dataclasses.dataclass(frozen=True)
class Classify(Method):
    """Softmax cross-entropy of a ViT's head."""

    config: ViTConfig

    def init(self, rng: Any, batch: Any) -> Any:
        return ViT(self.config).init(rng, batch["image"])["params"], Carry(ema={}, queues={}, stats={}, hparams={})

    def loss(self, params: Any, carry: Any, batch: Any, rng: Any, axis_name: str | None = None) -> Any:
        logits = ViT(self.config).apply({"params": params}, batch["image"]).logits  # type: ignore[union-attr]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss.mean(), (carry, {})


def data(batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, 224, 224, 3)).astype(np.float32), rng.integers(0, CLASSES, batch).astype(np.int32)


def vit_b16_ours(batch: int = 8) -> tuple[Timed, Timed]:
    """(forward, step): each call runs one on the same batch and waits for it; the step keeps its state."""
    method = Classify(ViTConfig.b16(num_classes=CLASSES))
    optimizer = Optimizer(adamw(RATE, DECAY))
    image, label = data(batch)
    examples = {"image": image, "label": label}
    lift = JitLift(functools.partial(train_step, method, optimizer))
    state = lift.place(jax.jit(lambda rng: create_state(method, optimizer, rng, examples))(jax.random.key(0)))
    on_device = lift.place_batch(examples)
    apply = jax.jit(lambda params, image: ViT(method.config).apply({"params": params}, image).logits)  # type: ignore
    params = jax.tree.map(jnp.copy, state.params)  # the step donates the state's own
    held = [state]

    def step() -> None:
        held[0], metrics = lift.step(held[0], on_device)
        jax.block_until_ready(metrics["loss"])
        jax.block_until_ready(held[0].params)

    return lambda: jax.block_until_ready(apply(params, on_device["image"])), step


def vit_b16_torch(batch: int = 8) -> tuple[Timed, Timed]:
    """The same by transformers' ViTForImageClassification (SDPA attention) and torch's AdamW."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(layer_norm_eps=1e-6, id2label={i: str(i) for i in range(CLASSES)})
    )
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    image, label = data(batch)
    pixels, labels = torch.tensor(image).permute(0, 3, 1, 2).contiguous(), torch.tensor(label).long()

    def forward() -> None:
        model.eval()
        with torch.no_grad():
            model(pixel_values=pixels)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        optimizer.step()

    return forward, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    ours, theirs = vit_b16_ours(arguments.batch), vit_b16_torch(arguments.batch)
    print("| ViT-B/16 | mmjax s | PyTorch s | ratio (median over rounds) |\n|---|---|---|---|")
    for i, what in enumerate(("forward", "step (AdamW)")):
        seconds = alternate({"ours": ours[i], "theirs": theirs[i]}, arguments.rounds)
        medians = [f"{statistics.median(values):.3f}" for values in seconds.values()]
        print(f"| {what} | {' | '.join(medians)} | {ratio(seconds, 'ours', 'theirs'):.2f} |", flush=True)


if __name__ == "__main__":
    main()
