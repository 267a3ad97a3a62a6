"""Which parameters the fine-tuning methods of ALBEF and BLIP train. Pre-training and retrieval: test_albef.py and
test_blip_training.py; text assignment: test_albef_assignment.py."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_albef
import tiny_blip

from mmjax import tree
from mmjax.models.albef.finetune import AlbefAnswering, AlbefClassification
from mmjax.models.blip.finetune import BlipAnswering, BlipCaptioning, BlipClassification
from mmjax.training.method import Method, loss_value
from mmjax.training.state import Carry

ENTAILMENT = dataclasses.replace(tiny_albef.PAIRS, text=tiny_albef.WORDLESS, classes=3, two_images=False)
METHODS: dict[str, Method] = {
    "albef_entailment": AlbefClassification(tiny_albef.still(ENTAILMENT)),
    "albef_nlvr": AlbefClassification(tiny_albef.still(tiny_albef.PAIRS)),
    "albef_vqa": AlbefAnswering(tiny_albef.still(tiny_albef.ANSWERS)),
    "blip_caption": BlipCaptioning(tiny_blip.still(tiny_blip.CAPTIONER), prompt_length=2),
    "blip_vqa": BlipAnswering(tiny_blip.still(tiny_blip.VQA)),
    "blip_nlvr": BlipClassification(tiny_blip.still(tiny_blip.NLVR)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_has_a_gradient_and_no_momentum_copy_has(name: str):
    """But for the keys' biases, to which a softmax is invariant. BLIP's fine-tuning of these tasks has no momentum
    encoders; ALBEF's are copies of everything."""
    method, batch, rng = METHODS[name], tiny_albef.batch(size=4), np.random.default_rng(1)
    params, carry = jax.eval_shape(method.init, jax.random.key(0), batch)
    assert carry.ema.keys() == (params.keys() if name.startswith("albef") else set()) and not carry.queues

    def random(path: str, leaf: Any) -> Any:
        return ((1 if path.endswith("scale") else 0) + 0.3 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    params, ema = (tree.map_with_path(random, leaves) for leaves in (params, carry.ema))
    hparams = dict.fromkeys(carry.hparams, jnp.float32(0.4))

    @jax.jit
    def gradients(params: Any, ema: Any) -> Any:
        def loss(params: Any, ema: Any) -> Any:
            return loss_value(
                method.loss(params, Carry(ema, hparams=hparams), batch, jax.random.key(4), jnp.int32(0))[0]
            )

        return jax.grad(loss, (0, 1))(params, ema)

    student, teacher = (tree.flatten(grads) for grads in gradients(params, ema))
    largest = {path: float(np.abs(np.asarray(leaf)).max()) for path, leaf in student.items()}
    unmoved = {path for path, value in largest.items() if value < 1e-7}
    assert unmoved == {path for path in largest if "attention/" in path and path.endswith("/k/bias")}
    assert teacher.keys() == tree.flatten(ema).keys() and not any(np.asarray(leaf).any() for leaf in teacher.values())
