"""Cached features: reused for the same weights, settings and files, and for no others."""

import os
import pathlib
from typing import Any

import numpy as np
import pytest

from mmjax.data.image_folder import ImageFolder
from mmjax.evaluation.feature_cache import cached_features


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path / "cache"))
    for name in ("ant/1.png", "ant/2.png", "cat/1.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(name.encode())
    return tmp_path


class Counted:
    """Counts how often features are computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"image": np.full((3, 5), self.calls, np.float32), "index": np.arange(3)}


def cached_result(folder: pathlib.Path, compute: Counted, network: Any = None, settings: Any = ("a", 7)) -> float:
    network = {"kernel": np.arange(11, dtype=np.float32)} if network is None else network
    columns = cached_features((network, {}), settings, ImageFolder(folder / "images"), compute)
    assert columns["image"].dtype == np.float32 and columns["index"].tolist() == [0, 1, 2]
    return float(columns["image"][0, 0])


def test_equal_inputs_are_computed_once(folder):
    compute = Counted()
    assert [cached_result(folder, compute) for _ in range(3)] == [1, 1, 1]
    assert len(list((folder / "cache" / "features").iterdir())) == 1


def test_other_weights_settings_or_files_are_computed(folder):
    compute = Counted()
    cached_result(folder, compute)
    assert cached_result(folder, compute, {"kernel": np.arange(11, dtype=np.float32) + 1e-6}) == 2
    assert cached_result(folder, compute, settings=("a", 8)) == 3
    (folder / "images" / "cat" / "1.png").write_bytes(b"cat/2.png")  # as long as before
    os.utime(folder / "images" / "cat" / "1.png", ns=(1, 1))
    assert cached_result(folder, compute) == 4
    (folder / "images" / "cat" / "1.png").rename(folder / "images" / "ant" / "3.png")
    assert cached_result(folder, compute) == 5
    assert cached_result(folder, compute) == 5


def test_damaged_files_are_recomputed_and_unwritable_ones_ignored(folder, monkeypatch):
    compute = Counted()
    cached_result(folder, compute)
    (file,) = (folder / "cache" / "features").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert cached_result(folder, compute) == 2 and cached_result(folder, compute) == 2
    (folder / "file").write_text("no folder")
    monkeypatch.setenv("MMJAX_CACHE", str(folder / "file"))
    assert cached_result(folder, compute) == 3 and cached_result(folder, compute) == 4
