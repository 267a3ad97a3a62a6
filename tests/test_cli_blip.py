"""BLIP from the command line: captions and their scores, answers, grounding, and the formula of its reranking."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest
from models.tiny_blip import CAPTIONER, ITM, VQA, init
from models.tiny_blip import TOKENIZER as WORDS
from PIL import Image

from mmjax import cli, hub
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.evaluation.captions import caption_scores
from mmjax.evaluation.report import from_json
from mmjax.models.blip.tasks import ADDED, BlipModel

pytestmark = pytest.mark.usefixtures("quick_compilation")

CAPTIONS = ["the dog on the mat", "two cat in the sea", "a red boat"]


@pytest.fixture(scope="module")
def models() -> dict[str, BlipModel]:
    tokenizer, preprocess = WORDS.with_appended(ADDED), ImagePreprocessing((8, 8), None)
    configs = {"itm": ITM, "captioner": CAPTIONER, "vqa": VQA}
    return {name: BlipModel(one, init(one), {}, tokenizer, preprocess, "original") for name, one in configs.items()}


@pytest.fixture
def pictures(models, tmp_path, monkeypatch) -> list[np.ndarray]:
    """0.png to 2.png in the current folder; sources "itm", "captioner" and "vqa" load these models."""
    monkeypatch.setattr(hub, "load", lambda source, **_: models[source])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    images = [np.random.default_rng(i).integers(0, 256, (20, 30, 3)).astype(np.uint8) for i in range(3)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(f"{i}.png")
    pathlib.Path("test.json").write_text(
        json.dumps([{"image": f"{i}.png", "caption": [text, "a picture"]} for i, text in enumerate(CAPTIONS)])
    )
    return images


def facts(task: str) -> dict[str, Any]:
    return json.loads(pathlib.Path(f"evaluations/{task}.json").read_text())


def test_captions_and_their_scores(models, pictures, capsys):
    assert cli.main(["caption", "captioner", "0.png", "1.png", "--num_beams", "1"]) == 0
    printed = capsys.readouterr().out
    for i, text in enumerate(models["captioner"].caption(pictures[:2], num_beams=1)):
        assert any(f"{i}.png" in line and text in line for line in printed.splitlines())
    assert cli.main(["evaluate", "captioner", "--task", "captions", "--data", "test.json"]) == 0
    written = models["captioner"].caption(pictures)
    expected = caption_scores(written, [[text, "a picture"] for text in CAPTIONS])
    scores = from_json(json.dumps(facts("captions")))
    assert {name: score.value for name, score in scores.items()} == {name: one.value for name, one in expected.items()}
    assert json.loads(pathlib.Path("evaluations/captions_predictions.json").read_text()) == written
    assert cli.main(["caption", "itm", "0.png"]) == 2
    assert "this blip does not caption; it can match, retrieve, ground" in capsys.readouterr().err


def test_answers_are_ranked_by_smoothed_losses_or_written(models, pictures, capsys):
    flags = ["answer", "vqa", "0.png", "--question", "what color is the boat?"]
    assert cli.main([*flags, "--answers", "red,yes,two dog", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    ranked = models["vqa"].answer(pictures[:1], ["what color is the boat?"], ["red", "yes", "two dog"], top=3)[0]
    for name, share in ranked:
        assert any(name in line and f"{100 * share:.1f} %" in line for line in lines)
    assert cli.main(flags) == 0
    assert models["vqa"].answer(pictures[:1], ["what color is the boat?"])[0] in capsys.readouterr().out


def test_the_score_of_reranking_adds_the_similarity(models, pictures, capsys):
    """The original's formula by default, ALBEF's on request; R@1 against every pair scored apart."""
    model = models["itm"]
    texts = [text for caption in CAPTIONS for text in (caption, "a picture")]
    owner = np.repeat(np.arange(3), 2)
    itm = np.stack([model.pair_logits("itm_logits", texts, 32, [image] * 6)[:, 1] for image in pictures])
    similarity = np.asarray(model.encode_image(pictures) @ model.encode_text(texts).T)
    for formula, matrix in ((None, itm + similarity), ("itm", itm)):
        extra = [] if formula is None else ["--formula", formula]
        assert cli.main(["evaluate", "itm", "--task", "retrieval", "--data", "test.json", *extra]) == 0
        assert facts("retrieval")["formula"] == ("ITM logit" if formula else "ITM logit + similarity")
        scores = from_json(json.dumps(facts("retrieval")))
        # A tie between equal texts counts against the model.
        ranks = (matrix >= matrix[owner, np.arange(6)]).sum(0) - 1
        assert scores["text_to_image_R@1"].value == pytest.approx(100 * np.mean(ranks == 0))


def test_grounding_uses_the_words(models, pictures, capsys):
    assert cli.main(["ground", "itm", "0.png", "--text", "the red boat", "--out", "heat.png"]) == 0
    result = models["itm"].ground(pictures[0], "the red boat")
    assert f"x {result.box[0]:.0f}, y {result.box[1]:.0f}" in capsys.readouterr().out and os.path.exists("heat.png")
    assert result.heat.shape == (20, 30) and result.cam.max() > 0
    assert models["itm"].grounding_block() == 0  # the last but one of two layers; 7 of twelve
    assert cli.main(["ground", "itm", "0.png", "--text", "the red boat", "--block", "1"]) == 2
    assert "block=1: layers whose cross attention gives a map are 0 to 0" in capsys.readouterr().err
