"""Every training method starts from a run of its own by the one rule of `mmjax.training.initialize`."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_albef as tiny
import tiny_blip
import tiny_blip2
from test_every_method import CONTRAST, METHODS, RESNET, batch_of

from mmjax import tree
from mmjax.models.albef.finetune import AlbefRetrieval
from mmjax.models.blip.finetune import BlipRetrieval
from mmjax.models.blip.pretrain import BlipPretraining
from mmjax.models.blip2.pretrain import Blip2Pretraining
from mmjax.models.clip.pretrain import CLIP
from mmjax.models.moco.network import MoCoConfig
from mmjax.models.moco.pretrain import MoCoMethod
from mmjax.models.resnet.supervised import ResNetClassifier
from mmjax.training import checkpoint
from mmjax.training.classification import Classification
from mmjax.training.initialize import initialize_from
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.state import create_state

STARTS = METHODS | {
    "clip": lambda _: CLIP(CONTRAST),
    "moco": lambda _: MoCoMethod(MoCoConfig.v2(dataclasses.replace(RESNET, num_classes=0), dim=7, queue=16)),
    "resnet_averaged": lambda _: Classification(ResNetClassifier(RESNET), 5, weight_ema=0.9),
    "albef_pretraining": lambda _: tiny.pretraining(),
    "albef_retrieval": lambda _: AlbefRetrieval(tiny.RETRIEVAL),
    "blip_pretraining": lambda _: BlipPretraining(tiny_blip.PRETRAINING),
    "blip_retrieval": lambda _: BlipRetrieval(tiny_blip.RETRIEVAL),
    "blip2_pretraining": lambda _: Blip2Pretraining(tiny_blip2.PRETRAINING),
}


def random_state(shapes, seed):
    """A state of these shapes, without compiling the initialisation."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        return (9 * rng.normal(size=shape.shape)).astype(shape.dtype)

    return jax.tree.map(leaf, shapes)


@pytest.mark.parametrize("name", STARTS)
def test_model_and_queues_come_along_and_the_course_does_not(name, tmp_path):
    method, optimizer = STARTS[name]("float32"), Optimizer(adamw(1e-3))
    shapes = jax.eval_shape(lambda rng: create_state(method, optimizer, rng, batch_of(name)), jax.random.key(0))
    source, fresh = random_state(shapes, 1), random_state(shapes, 2)
    writer = checkpoint.CheckpointWriter(tmp_path)
    writer.save(source, 5)
    writer.wait()
    state, report = initialize_from(fresh, checkpoint.load_params(tmp_path), "the run")
    for field in ("params", "stats", "ema", "queues"):
        assert tree.tree_hash(getattr(state, field)) == tree.tree_hash(getattr(source, field)), field
    if "averaged_stats" in state.extra:  # they belong to the averaged parameters, which are in ema
        averaged = source.extra["averaged_stats"]
        assert tree.tree_hash(state.extra["averaged_stats"]) == tree.tree_hash(averaged)
        fresh = fresh.replace(extra={**fresh.extra, "averaged_stats": averaged})
    for field in ("step", "opt_state", "hparams", "rng", "skipped", "extra"):
        assert tree.tree_hash(getattr(state, field)) == tree.tree_hash(getattr(fresh, field)), field
    assert (f"; queues: {', '.join(source.queues)}" in report) == bool(source.queues)
    assert "fresh" not in report
