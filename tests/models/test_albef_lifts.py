"""ALBEF's training steps: one device, eight by pmap and by a mesh give the same result, whatever the groups."""

from typing import Any

import numpy as np
import pytest
import tiny_albef as tiny
from lifts import in_eight_devices, run_lifts

from mmjax.models.albef.assignment import TextAssignment
from mmjax.models.albef.finetune import AlbefAnswering, AlbefClassification, AlbefRetrieval
from mmjax.training.method import Method
from mmjax.training.optimizer import Optimizer, sgd

STEPS = 5
EVERYWHERE: dict[str, Method] = {
    "pretraining_8": tiny.pretraining(alpha_steps=3, groups=8, blocks=3),
    "answering": AlbefAnswering(tiny.ANSWERS, alpha_steps=3),
}
PMAPPED: dict[str, Method] = {
    "retrieval": AlbefRetrieval(tiny.RETRIEVAL, alpha_steps=3),
    "pairs": AlbefClassification(tiny.PAIRS, alpha_steps=3),
    "pretraining_1": tiny.pretraining(alpha_steps=3),
    "assignment": TextAssignment(tiny.ASSIGNMENT, groups=2),
}


def run() -> dict[str, Any]:
    """With SGD: Adam turns gradients that are rounding errors into full steps."""
    batches = [tiny.batch(seed) for seed in range(STEPS)]

    def lifted(methods: dict[str, Method], *names: str) -> dict[str, Any]:
        return run_lifts({key: (method, Optimizer(sgd(0.03, 0.9)), batches) for key, method in methods.items()}, names)

    return lifted(EVERYWHERE, "jit", "pmap", "mesh") | lifted(PMAPPED, "jit", "pmap")


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_eight_devices(run, tmp_path_factory.mktemp("lifts"))


@pytest.mark.parametrize(
    ("name", "lift"), [*((name, "mesh") for name in EVERYWHERE), *((name, "pmap") for name in EVERYWHERE | PMAPPED)]
)
def test_every_lift_is_the_same_step(lifted: dict[str, Any], name: str, lift: str):
    one, many = lifted[f"{name}/jit"], lifted[f"{name}/{lift}"]
    assert one["compiles"] == many["compiles"] == 1
    for expected, other in zip(one["metrics"], many["metrics"], strict=True):
        assert expected.keys() == other.keys() and expected["skipped_updates"] == 0
        np.testing.assert_allclose(other["loss"], expected["loss"], rtol=1e-5)
        for metric in expected:
            np.testing.assert_allclose(other[metric], expected[metric], rtol=1e-4, atol=1e-6, err_msg=metric)
    assert bool(one["carry"]) == (name != "assignment")
    for part in ("leaves", "carry"):
        assert one[part].keys() == many[part].keys()
        for path, leaf in one[part].items():
            tolerance = 1e-5 * np.abs(leaf).max()
            np.testing.assert_allclose(many[part][path], leaf, atol=tolerance, rtol=0, err_msg=path)
