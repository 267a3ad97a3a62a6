"""CapFilt on tiny random BLIPs: scores are the models', shards resume, and a threshold needs no models."""

import dataclasses
import importlib.util
import io
import json
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmjax import cli, hub
from mmjax.data.webdataset import WebDataset
from mmjax.errors import MmjaxError
from mmjax.recipes.capfilt import Models, Sampling, Thresholds, load_scores, score_shard, scores_file, select_shard
from mmjax.recipes.capfilt_job import Job
from tests.models import tiny_blip

SAMPLING = Sampling(batch_size=2, max_length=9, min_length=5)
TEXTS = ("the red dog", "two cat on the mat", "boat in sea", None, "a hen of the left dog")


def write_shard(path: pathlib.Path, first: int = 0, broken: int | None = None) -> pathlib.Path:
    """Five samples: a PNG with a text, one without a text; `broken`: the number of one that is no image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    with tarfile.open(path, "w") as archive:
        for i, text in enumerate(TEXTS):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (12, 10, 3), np.uint8)).save(file, "PNG")
            members = {"png": b"no image" if i == broken else file.getvalue(), "json": b'{"url": "u"}'}
            members |= {} if text is None else {"txt": text.encode()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{first + i:04d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(tiny_blip.model(tiny_blip.CAPTIONER), tiny_blip.model(tiny_blip.ITM))


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    hub.save(models.captioner, folder / "captioner")
    hub.save(models.filter, folder / "filter")
    return str(folder / "captioner"), str(folder / "filter")


def images_of(shard: pathlib.Path) -> list[Image.Image]:
    return [Image.open(io.BytesIO(WebDataset(shard)[i]["image"])).convert("RGB") for i in range(len(WebDataset(shard)))]


def test_scores_are_those_of_the_models_one_by_one(models, tmp_path):
    shard = write_shard(tmp_path / "in" / "0.tar")
    header, lines = load_scores(score_shard(shard, tmp_path / "out", models, SAMPLING))
    assert header["sampling"]["batch_size"] == 2 and header["filter"] == models.identity["filter"]
    assert [line["key"] for line in lines] == [f"{i:04d}" for i in range(5)]
    for line, image, web in zip(lines, images_of(shard), TEXTS):
        sources = [text["source"] for text in line["texts"]]
        assert sources == (["synthetic"] if web is None else ["web", "synthetic"])
        assert web is None or line["texts"][0]["text"] == web
        for text in line["texts"]:
            assert text["itm"] == pytest.approx(float(models.filter.match([image], [text["text"]])[0]), abs=1e-5)
            features = models.filter.encode_image([image]), models.filter.encode_text([text["text"]])
            assert text["itc"] == pytest.approx(float(np.sum(features[0] * features[1])), abs=1e-5)


def test_captions_depend_on_the_seed_and_on_nothing_else(models, tmp_path):
    def synthetic(out: str, **fields) -> list[str]:
        shard = write_shard(tmp_path / "in" / "0.tar")
        _, lines = load_scores(score_shard(shard, tmp_path / out, models, dataclasses.replace(SAMPLING, **fields)))
        return [text["text"] for line in lines for text in line["texts"] if text["source"] == "synthetic"]

    assert synthetic("a") == synthetic("b") != synthetic("c", seed=1)
    # Several captions of one image: each text once.
    assert len(synthetic("d", captions=3)) > len(synthetic("a"))
    assert len(synthetic("e", top_p=0)) == 5


def test_selection_keeps_what_reaches_the_threshold(models, tmp_path):
    shard, out = write_shard(tmp_path / "in" / "0.tar"), tmp_path / "out"
    scores = score_shard(shard, out, models, SAMPLING)
    _, lines = load_scores(scores)
    values = sorted(text["itm"] for line in lines for text in line["texts"])
    thresholds = Thresholds(itm=values[len(values) // 2])
    counts = select_shard(shard, scores, out, thresholds)
    expected = {
        line["key"]: kept
        for line in lines
        if (kept := [text["text"] for text in line["texts"] if text["itm"] >= thresholds.itm])
    }
    selected = WebDataset(out / "0.tar")
    records = {selected[i]["key"]: selected[i] for i in range(len(selected))}
    assert {key: list(record["texts"]) for key, record in records.items()} == expected
    source = WebDataset(shard)
    images = {source[i]["key"]: source[i]["image"] for i in range(len(source))}
    assert all(record["image"] == images[key] for key, record in records.items())
    assert all(record["json"]["url"] == "u" and record["text"] == expected[key][0] for key, record in records.items())
    assert counts["images"] == 5 and counts["images kept"] == len(expected)
    assert counts["web kept"] + counts["synthetic kept"] == sum(map(len, expected.values()))
    # The cosine is a second condition.
    both = select_shard(shard, scores, out, Thresholds(thresholds.itm, itc=2.0))
    assert both["images kept"] == 0


def test_an_unreadable_image_is_counted_and_left_out(models, tmp_path):
    shard, out = write_shard(tmp_path / "in" / "0.tar", broken=1), tmp_path / "out"
    scores = score_shard(shard, out, models, SAMPLING)
    _, lines = load_scores(scores)
    assert "not an image" in lines[1]["problem"] and [("texts" in line) for line in lines] == [True, False] + [True] * 3
    counts = select_shard(shard, scores, out, Thresholds(0.0))
    assert counts["problems"] == 1 and counts["images"] == 5 and counts["images kept"] == 4
    assert [WebDataset(out / "0.tar")[i]["key"] for i in range(4)] == ["0000", "0002", "0003", "0004"]


def test_an_interrupted_job_continues_behind_its_last_whole_shard(saved, tmp_path, monkeypatch):
    shards = [write_shard(tmp_path / "in" / f"{n}.tar", 10 * n) for n in range(3)]
    job = Job(shards, tmp_path / "out", *saved, SAMPLING, Thresholds(0.3))
    calls: list[int] = []
    match = Models.match

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 5:  # in the second shard: three batches each
            raise KeyboardInterrupt
        return match(self, *args)

    monkeypatch.setattr(Models, "match", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    files = sorted(path.name for path in job.out.iterdir())
    assert files == ["0.scores.jsonl", "0.selected.json", "0.tar"]
    before = (job.out / "0.tar").stat().st_mtime_ns
    job.run()
    assert len(calls) == 5 + 6 and (job.out / "0.tar").stat().st_mtime_ns == before
    whole = dataclasses.replace(job, out=tmp_path / "whole")
    whole.run()
    for shard in shards:
        assert (job.out / shard.name).read_bytes() == (whole.out / shard.name).read_bytes()


def test_another_threshold_needs_no_models_and_two_processes_give_what_one_gives(saved, tmp_path):
    shards = [write_shard(tmp_path / "in" / f"{n}.tar", 10 * n) for n in range(3)]
    job = Job(shards, tmp_path / "out", *saved, SAMPLING, Thresholds(0.3))
    for process in range(2):
        job.run(process, 2)
    console = Console(file=io.StringIO(), width=100)
    counts = job.report(console)
    assert counts["images"] == 15 and "3 of 3 shards" in console.file.getvalue()
    alone = dataclasses.replace(job, out=tmp_path / "alone")
    alone.run()
    assert all((job.out / s.name).read_bytes() == (alone.out / s.name).read_bytes() for s in shards)
    again = dataclasses.replace(job, captioner=None, filter=None, thresholds=Thresholds(1.1))
    again.run()
    assert again.report(console)["images kept"] == 0 and len(WebDataset(again.out / "1.tar", needs=())) == 0


def test_the_command_writes_counts_and_a_picture(saved, tmp_path, capsys):
    for n in range(2):
        write_shard(tmp_path / "in" / f"{n}.tar", 10 * n)
    captioner, filter = saved
    arguments = ["--in", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--captioner", captioner]
    arguments += ["--filter", filter, "--batch_size", "2", "--max_length", "9", "--threshold", "0.4"]
    assert cli.main(["capfilt", *arguments]) == 0
    output = capsys.readouterr().out
    assert "1.tar (2/2)" in output and "synthetic" in output
    facts = json.loads((tmp_path / "out" / "capfilt.json").read_bytes())
    assert facts["counts"]["web"] == 8 and facts["thresholds"] == {"itm": 0.4, "itc": None}
    picture = np.asarray(Image.open(tmp_path / "out" / "capfilt.png"))
    assert picture.ndim == 3 and picture.std() > 10


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"out": "in"}, "--out"),
        ({"filter": None}, "0.scores.jsonl: no such file"),
        ({"twice": True}, "two shards have the name 0.tar"),
    ],
)
def test_a_job_that_cannot_be_right_is_refused(saved, tmp_path, fields, message):
    shards = [write_shard(tmp_path / "in" / "0.tar")]
    if fields.pop("twice", False):
        shards.append(write_shard(tmp_path / "other" / "0.tar"))
    options = {"captioner": saved[0], "filter": saved[1], "out": "out"} | fields
    with pytest.raises(MmjaxError, match=message):
        Job(shards, tmp_path / options.pop("out"), **options)


def test_models_that_cannot_do_it_and_scores_of_others_are_refused(models, tmp_path):
    with pytest.raises(MmjaxError, match=r"--captioner.*cannot caption"):
        Models(models.filter, models.filter)
    with pytest.raises(MmjaxError, match=r"--filter.*cannot match"):
        Models(models.captioner, models.captioner)
    shard = write_shard(tmp_path / "in" / "0.tar")
    score_shard(shard, tmp_path / "out", models, SAMPLING)
    with pytest.raises(MmjaxError, match=r"0\.scores\.jsonl.*another sampling"):
        score_shard(shard, tmp_path / "out", models, dataclasses.replace(SAMPLING, seed=1))
    other = write_shard(tmp_path / "other" / "0.tar", first=50)
    with pytest.raises(MmjaxError, match=r"0\.scores\.jsonl: scores of 0000 where .* has 0050"):
        select_shard(other, scores_file(shard, tmp_path / "out"), tmp_path / "out", Thresholds())
    with pytest.raises(MmjaxError, match=r"top_p=1\.5"):
        Sampling(top_p=1.5)


RAY = """
import pathlib, sys
from mmjax.recipes.capfilt import Sampling, Thresholds
from mmjax.recipes.capfilt_job import Job
folder, captioner, filter = sys.argv[1:]
shards = sorted(pathlib.Path(folder, "in").glob("*.tar"))
sampling = Sampling(batch_size=2, max_length=9, min_length=5)
Job(shards, pathlib.Path(folder, "ray"), captioner, filter, sampling, Thresholds(0.3)).run_on_ray(2)
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_a_ray_job_writes_the_same_shards(saved, tmp_path):
    shards = [write_shard(tmp_path / "in" / f"{n}.tar", 10 * n) for n in range(2)]
    job = Job(shards, tmp_path / "out", *saved, SAMPLING, Thresholds(0.3))
    job.run()
    child = subprocess.run(
        [sys.executable, "-c", RAY, str(tmp_path), *saved], capture_output=True, text=True, timeout=300
    )
    assert child.returncode == 0, child.stderr[-2000:]
    for shard in shards:
        assert (tmp_path / "ray" / shard.name).read_bytes() == (job.out / shard.name).read_bytes()
