"""Kept features: found again for the same weights, settings and files, and for no others."""

import os
import pathlib
from typing import Any

import numpy as np
import pytest

from mmjax.data.image_folder import ImageFolder
from mmjax.evaluation.feature_cache import kept


@pytest.fixture
def place(tmp_path, monkeypatch) -> pathlib.Path:
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


def asked(place: pathlib.Path, compute: Counted, network: Any = None, settings: Any = ("a", 7)) -> float:
    network = {"kernel": np.arange(11, dtype=np.float32)} if network is None else network
    columns = kept((network, {}), settings, ImageFolder(place / "images"), compute)
    assert columns["image"].dtype == np.float32 and columns["index"].tolist() == [0, 1, 2]
    return float(columns["image"][0, 0])


def test_the_same_question_is_answered_once(place):
    compute = Counted()
    assert [asked(place, compute) for _ in range(3)] == [1, 1, 1]
    assert len(list((place / "cache" / "features").iterdir())) == 1


def test_other_weights_settings_or_files_are_computed(place):
    compute = Counted()
    asked(place, compute)
    assert asked(place, compute, {"kernel": np.arange(11, dtype=np.float32) + 1e-6}) == 2
    assert asked(place, compute, settings=("a", 8)) == 3
    (place / "images" / "cat" / "1.png").write_bytes(b"cat/2.png")  # as long as before
    os.utime(place / "images" / "cat" / "1.png", ns=(1, 1))
    assert asked(place, compute) == 4
    (place / "images" / "cat" / "1.png").rename(place / "images" / "ant" / "3.png")
    assert asked(place, compute) == 5
    assert asked(place, compute) == 5


def test_what_is_damaged_is_made_anew_and_what_cannot_be_written_is_not_missed(place, monkeypatch):
    compute = Counted()
    asked(place, compute)
    (file,) = (place / "cache" / "features").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert asked(place, compute) == 2 and asked(place, compute) == 2
    (place / "file").write_text("no folder")
    monkeypatch.setenv("MMJAX_CACHE", str(place / "file"))
    assert asked(place, compute) == 3 and asked(place, compute) == 4
