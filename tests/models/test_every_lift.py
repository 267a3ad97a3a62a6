"""Every system's training step: one device, eight by pmap and by a mesh give the same result."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from lift_cases import CASES

from mmjax import tree

LIFTS = [(name, lift) for name, case in CASES.items() for lift in ("pmap", *case.meshes)]


@pytest.fixture(scope="module")
def lifted(
    request: pytest.FixtureRequest, repository: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The results of lifts_child.py for all cases that were collected."""
    here, out = pathlib.Path(__file__).parent, tmp_path_factory.mktemp("lifts") / "out.json"
    items = (item for item in request.session.items if item.path == request.path)
    names = dict.fromkeys(item.callspec.params["name"] for item in items if hasattr(item, "callspec"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (repository, here.parent, here))),
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-W", "error", str(here / "lifts_child.py"), str(out), *names]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(out.read_text())


def results(lifted: dict[str, Any], name: str, *lifts: str) -> list[Any]:
    assert "error" not in lifted[name], lifted[name]["error"]
    return [lifted[name][lift] for lift in lifts]


def fits(path: str, globs: tuple[str, ...]) -> bool:
    return any(tree.matches(path, glob) for glob in globs)


def near(actual: Any, expected: Any, tolerance: float, path: str) -> None:
    """Within `tolerance` of the array's own largest value."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, atol=tolerance * scale, rtol=0, err_msg=path)


@pytest.mark.parametrize(("name", "lift"), LIFTS)
def test_every_lift_is_the_same_step(lifted: dict[str, Any], name: str, lift: str):
    one, many = results(lifted, name, "jit", lift)
    assert one["compiles"] == many["compiles"] == 1
    for expected, actual in zip(one["metrics"], many["metrics"], strict=True):
        assert expected.keys() == actual.keys() and expected["skipped_updates"] == 0
        np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)
        for metric in expected:
            np.testing.assert_allclose(actual[metric], expected[metric], rtol=1e-4, atol=1e-6, err_msg=metric)
    assert one["leaves"].keys() == many["leaves"].keys()
    for path, leaf in one["leaves"].items():
        if fits(path, CASES[name].rounding) and path.startswith("stats/"):
            assert max(np.abs(leaf).max(), np.abs(many["leaves"][path]).max()) < 1e-6, path
        else:
            near(many["leaves"][path], leaf, 1e-5, path)
    mesh = CASES[name].meshes.get(lift)
    assert (many["cut"] > 0) == (mesh is None or mesh.fsdp > 1)


@pytest.mark.parametrize(("name", "lift"), LIFTS)
def test_every_lift_moves_every_parameter_as_far(lifted: dict[str, Any], name: str, lift: str):
    """The changes of the steps are compared, not only their sum with the start."""
    start, frozen, one, many = results(lifted, name, "start", "frozen", "jit", lift)
    for path, begin in start.items():
        if not path.startswith("params/"):
            continue
        actual, expected = (np.asarray(end["leaves"][path]) - np.asarray(begin) for end in (many, one))
        largest = np.abs(expected).max()
        if path in frozen or fits(path, CASES[name].unused):
            assert largest == np.abs(actual).max() == 0, path
        elif fits(path, CASES[name].rounding):
            assert max(largest, np.abs(actual).max()) < 1e-6, path
        else:
            assert largest > 1e-5, path
            near(actual, expected, 1e-3, path)
