"""A language model's training step, with adapters: one device, eight by pmap and by a mesh give the same result."""

from typing import Any

import numpy as np
import pytest
from lifts import in_eight_devices, run_lifts

from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.pretrain import CausalLM
from mmjax.training.lora import LoRA, LoRAConfig
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, sgd

SIZE, STEPS, VOCAB = 16, 5, 53
ADAPTERS = LoRAConfig(("block_*/**",), rank=3, alpha=6.0, dropout=0.2)
DECODER = DecoderConfig.llama(12, 2, 2, 20, vocab_size=VOCAB, kv_heads=1, head_width=6, tied=True)


def batch(seed: int) -> dict[str, np.ndarray]:
    """Texts of 11 tokens; devices have different numbers of labels."""
    rng = np.random.default_rng(seed)
    ids, labels = rng.integers(5, VOCAB, (2, SIZE, 11)).astype(np.int32)
    labels[np.arange(11) > rng.integers(1, 11, SIZE)[:, None]] = -100
    return {"input_ids": ids, "labels": labels}


def run() -> dict[str, Any]:
    """With SGD: Adam turns gradients that are rounding errors into full steps."""
    method: Method = LoRA(CausalLM(DECODER, z_loss=1e-3), ADAPTERS)
    optimizer, batches = Optimizer(sgd(0.05, 0.9), ADAPTERS.partition()), [batch(seed) for seed in range(STEPS)]
    return run_lifts({"adapters": (method, optimizer, batches)}, ("jit", "pmap", "mesh"))


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_eight_devices(run, tmp_path_factory.mktemp("lifts"))


@pytest.mark.parametrize("lift", ["pmap", "mesh"])
def test_adapters_move_the_same_over_every_lift(lifted: dict[str, Any], lift: str):
    one, many = lifted["adapters/jit"], lifted[f"adapters/{lift}"]
    assert one["compiles"] == many["compiles"] == 1
    for expected, other in zip(one["metrics"], many["metrics"], strict=True):
        np.testing.assert_allclose(other["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["gradient_norm"], expected["gradient_norm"], rtol=1e-4)
    assert one["metrics"][0]["gradient_norm"] > 0
    assert one["leaves"].keys() == many["leaves"].keys()
    for path, leaf in one["leaves"].items():
        np.testing.assert_allclose(many["leaves"][path], leaf, atol=1e-5 * np.abs(leaf).max(), rtol=0, err_msg=path)
