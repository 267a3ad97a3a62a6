"""ResNet-50, ViT-B/16, CLIP B/32 and BERT-base: a forward pass and a training step, ours against transformers'.

    python -m experiments.benchmarks.networks --rounds 7

Random weights, 224 px or 128 tokens, batch 8; float32 on a CPU, with as many threads for PyTorch as the process may
use, bfloat16 on an accelerator. Our step is the library's own `train_step` under its `jit` lift, with its check for
finite updates; the other side's is forward, backward and torch's optimizer (networks_torch.py). The sides alternate, so
that a change in the machine's load meets both; the ratio is the median over rounds, and only ratios mean anything.
BERT's step is pretraining's, with 20 masked words a text: as in the original we name those alone, where transformers
names every token. Its forward pass names all in both.

TFLOP/s counts matrix products and convolutions, as published figures do, against the speed of one large product
measured in the same run. What a GPU's fused attention kernel does is not counted (under 5 % of these networks).
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import Timed, alternate, ratio
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.bert.pretrain import BERT
from mmjax.models.clip.network import CLIP as CLIPNetwork
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.pretrain import CLIP
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.supervised import ViTClassifier
from mmjax.nn.norm import l2_normalize
from mmjax.training.classification import Classification
from mmjax.training.lift import JitLift
from mmjax.training.optimizer import Optimizer, adamw, sgd
from mmjax.training.roofline import matrix_flops
from mmjax.training.state import create_state
from mmjax.training.step import train_step

NAMES = {"resnet": "ResNet-50", "vit": "ViT-B/16", "clip": "CLIP B/32", "bert": "BERT-base"}
CLASSES, SIDE, WORDS = 1000, 224, 77
LENGTH, MASKED = 128, 20
"""The length of BERT's texts and the number of masked tokens."""
SGD: dict[str, Any] = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
ADAMW: dict[str, Any] = {"learning_rate": 1e-4, "weight_decay": 0.05}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the networks: the published ones, or tiny ones that test the script in seconds (`--tiny`)."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    depth: int = 12


def data(name: str, batch: int) -> dict[str, np.ndarray]:
    """Normalised images, and labels or texts; of BERT pairs of segments without padding."""
    rng = np.random.default_rng(0)
    if name == "bert":
        ids = rng.integers(1000, 30_000, (batch, LENGTH)).astype(np.int32)
        positions = np.stack([rng.choice(LENGTH, MASKED, replace=False) for _ in range(batch)]).astype(np.int32)
        batch_arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        batch_arrays |= {"masked_positions": positions, "masked_ids": np.take_along_axis(ids, positions, 1)}
        ones = np.ones((batch, MASKED), np.float32)
        return batch_arrays | {"masked_weights": ones, "next_label": rng.integers(0, 2, batch).astype(np.int32)}
    image = rng.normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32)
    if name != "clip":
        return {"image": image, "label": rng.integers(0, CLASSES, batch).astype(np.int32)}
    text = rng.integers(1, 49_000, (batch, WORDS))
    text[:, 0], text[:, -1] = 49_406, 49_407
    return {"image": image, "text": text.astype(np.int32)}


def recipe(name: str, sizes: Sizes, dtype: Any) -> tuple[Any, Optimizer, Callable[..., Any]]:
    """(method, optimizer, (params, stats, batch) -> logits in evaluation)."""
    if name == "clip":
        vision, text = ViTConfig.clip(224, 32, 768, sizes.depth, 12, 3072), CLIPTextConfig(depth=sizes.depth)
        method: Any = CLIP(CLIPConfig.b32(vision=vision, text=text, dtype=dtype))

        def logits(params: Any, stats: Any, batch: Any) -> Any:
            outputs: Any = CLIPNetwork(method.config).apply({"params": params}, batch["image"], batch["text"])
            image, words = (l2_normalize(outputs[tower]["embeds"]) for tower in ("vision", "text"))
            return jnp.exp(params["logit_scale"]) * image @ words.T

        return method, Optimizer(adamw(**ADAMW)), logits
    if name == "bert":
        pretraining = BERT(BertConfig.base(depth=sizes.depth, mlm=True, nsp=True, dtype=dtype))

        def words(params: Any, stats: Any, batch: Any) -> Any:
            outputs: Any = Bert(pretraining.config).apply(
                {"params": params}, batch["input_ids"], batch["attention_mask"]
            )
            return outputs["mlm_logits"], outputs["nsp_logits"]

        return pretraining, Optimizer(adamw(**ADAMW)), words
    if name == "vit":
        network: Any = ViTClassifier(ViTConfig.b16(num_classes=CLASSES, depth=sizes.depth, dtype=dtype))
    else:
        network = ResNetClassifier(ResNetConfig.r50(layers=sizes.blocks, dtype=dtype))
    transform = adamw(**ADAMW) if name == "vit" else sgd(**SGD)
    return (
        Classification(network, CLASSES),
        Optimizer(transform),
        lambda params, stats, batch: network.logits(params, stats, batch["image"], train=False)[0],
    )


def ours(name: str, batch: int, sizes: Sizes, dtype: str) -> tuple[dict[str, Timed], dict[str, float]]:
    """(what is timed: forward and step, the operations of each). Every call runs on one batch; the step keeps its
    state."""
    method, optimizer, forward = recipe(name, sizes, dtype)
    step = functools.partial(train_step, method, optimizer)
    lift, examples = JitLift(step), data(name, batch)
    state = lift.place(jax.jit(lambda rng: create_state(method, optimizer, rng, examples))(jax.random.key(0)))
    placed = lift.place_batch(examples)
    inputs = jax.tree.map(jnp.copy, (state.params, state.stats))  # the step donates the state's own
    work = {
        "forward": matrix_flops(jax.make_jaxpr(forward)(*inputs, placed)),
        "step": matrix_flops(jax.make_jaxpr(lambda state, batch: step(state, batch))(state, placed)),
    }
    compiled, states = jax.jit(forward), [state]

    def train() -> None:
        states[0], metrics = lift.step(states[0], placed)
        jax.block_until_ready((metrics["loss"], states[0].params))

    return {"forward": lambda: jax.block_until_ready(compiled(*inputs, placed)), "step": train}, work


def peak(dtype: str, size: int, rounds: int = 5) -> float:
    """Operations a second of one large matrix product: the best of some rounds of ten."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)) / size**0.5, dtype)
    chain = jax.jit(lambda x, y: functools.reduce(lambda z, _: z @ y, range(10), x))
    jax.block_until_ready(chain(x, x))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, x))
        seconds.append(time.perf_counter() - start)
    return 10 * 2 * size**3 / min(seconds)


def measure(name: str, batch: int, rounds: int, sizes: Sizes, dtype: str, best: float, alone: bool) -> list[str]:
    """Lines of the table."""
    mine, work = ours(name, batch, sizes, dtype)
    torch_timed: dict[str, Timed] = {}
    if not alone:
        from experiments.benchmarks import networks_torch

        torch_timed = networks_torch.timed(name, data(name, batch), sizes.blocks, sizes.depth, CLASSES, SGD, ADAMW)
    lines = []
    for what in ("forward", "step"):
        sides = {"mmjax": mine[what]} | ({"PyTorch": torch_timed[what]} if torch_timed else {})
        seconds = alternate(sides, rounds)
        middle = {side: statistics.median(values) for side, values in seconds.items()}
        rate = work[what] / middle["mmjax"]
        other = "- | -"
        if torch_timed:
            each = [a / b for a, b in zip(seconds["mmjax"], seconds["PyTorch"])]
            spread = f"{ratio(seconds, 'mmjax', 'PyTorch'):.2f} ({min(each):.2f} to {max(each):.2f})"
            other = f"{1e3 * middle['PyTorch']:.1f} | {spread}"
        lines.append(
            f"| {NAMES[name]} | {what} | {1e3 * middle['mmjax']:.1f} | {other} "
            f"| {rate / 1e12:.3g} | {100 * rate / best:.0f} % |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--alone", action="store_true", help="without PyTorch")
    parser.add_argument("--tiny", action="store_true", help="a block a stage or a tower, to try the script")
    options = parser.parse_args()
    accelerated = jax.default_backend() != "cpu"
    dtype = "bfloat16" if accelerated else "float32"
    sizes = Sizes((1, 1, 1, 1), 1) if options.tiny else Sizes()
    best = peak(dtype, 8192 if accelerated else 1024)
    print(
        f"{jax.devices()[0].device_kind}, {dtype}, batch {options.batch}: one product does {best / 1e12:.3g} TFLOP/s\n"
    )
    print("| network | | mmjax ms | PyTorch ms | ratio | TFLOP/s | of the product's |\n|---|---|---|---|---|---|---|")
    for name in options.only:
        print(*measure(name, options.batch, options.rounds, sizes, dtype, best, options.alone), sep="\n", flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
