"""From a model to a score on images and texts: match, answer, ground, retrieve --rerank, evaluate --data FILES."""

import dataclasses
import json
import os
import pathlib
import pickle
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mmjax
from mmjax import cli, hub, tree
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.referring import read_proposals, read_references
from mmjax.errors import MmjaxError
from mmjax.evaluation.grounding import Referred, grounding_scores
from mmjax.evaluation.report import from_json
from mmjax.evaluation.vqa import accuracy, comparable, normalised
from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.tasks import AlbefModel
from mmjax.models.bert.network import BertConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.text.wordpiece import SPECIAL, WordPieceTokenizer, wordpiece

CAPTIONS = [
    *("A red hen.", "a boat", "two hens in the sea", "a yellow harbour", "the fence", "a blue boat", "hens on a fence"),
]
ANSWERS = ["yes", "no", "red", "two", "a hen", "blue"]
QUESTIONS = ["What is it?", "how many hens"]
WORDS = sorted({word.strip(".?") for line in [*CAPTIONS, *ANSWERS, *QUESTIONS] for word in line.lower().split()})
TOKENIZER = WordPieceTokenizer(wordpiece({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, lower=True))
VISION = ViTConfig(width=12, depth=1, heads=2, hidden=17, patch=4, image_size=(12, 12), init="normal")
ALONE: dict[str, Any] = {"embed_dim": 0, "matching": False, "queue": 0}
PREPROCESS = ImagePreprocessing((12, 12), None)
N = 5


def text(**fields: Any) -> BertConfig:
    sizes = {"vocab_size": 29, "width": 12, "depth": 3, "heads": 3, "hidden": 17, "positions": 32}
    return BertConfig(**{**sizes, **fields, "pooler": False})


CONFIGS = {
    "retrieval": AlbefConfig(VISION, text(cross_from=1), embed_dim=6, queue=0, by_image=True),
    "entailment": AlbefConfig(VISION, text(cross_from=1), classes=3, **ALONE),
    "nlvr2": AlbefConfig(VISION, text(cross_from=1), classes=2, two_images=True, **ALONE),
    "vqa": AlbefConfig(VISION, text(cross_from=1), decoder=text(depth=1, cross_from=0, causal=True, mlm=True), **ALONE),
}


@pytest.fixture(scope="module")
def models() -> dict[str, AlbefModel]:
    def made(config: AlbefConfig) -> AlbefModel:
        rng = np.random.default_rng(0)
        shapes = AlbefModel.shapes(config)["params"]
        params = tree.map_with_path(lambda _, x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32), shapes)
        return AlbefModel(config, params, {}, TOKENIZER, PREPROCESS, "albef")

    return {name: made(config) for name, config in CONFIGS.items()}


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with images/0.png to 6.png and 0.jpg to 6.jpg; sources "retrieval", "vqa", ... load these models."""
    rng = np.random.default_rng(4)
    (tmp_path / "images").mkdir()
    for i in range(7):
        image = Image.fromarray(rng.integers(0, 256, (20 + i, 30 - i, 3)).astype(np.uint8))
        for suffix in ("png", "jpg"):
            image.save(tmp_path / "images" / f"{i}.{suffix}", lossless=True)
    monkeypatch.setattr(hub, "load", lambda source, **_: models[source])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def picture(i: int, suffix: str = "png") -> np.ndarray:
    return np.asarray(Image.open(f"images/{i}.{suffix}").convert("RGB"))


def write(name: str, content: Any) -> str:
    pathlib.Path(name).write_text(json.dumps(content))
    return name


def scores(task: str) -> dict[str, Any]:
    return {
        name: score.value for name, score in from_json(pathlib.Path(f"evaluations/{task}.json").read_text()).items()
    }


def facts(task: str) -> dict[str, Any]:
    return json.loads(pathlib.Path(f"evaluations/{task}.json").read_text())


def refused(arguments: list[str], message: str, capsys: Any) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


# --------------------------------------------------------------------------------------------------------------- verbs


def test_match_prints_probabilities_and_cosines(here, models, capsys):
    flags = ["images/0.png", "images/1.png", "--text", "a red hen", "--text", "the sea"]
    assert cli.main(["match", "retrieval", *flags]) == 0
    printed = capsys.readouterr().out
    model, images, texts = models["retrieval"], [picture(0), picture(1)], ["a red hen", "the sea"]
    cosines = np.asarray(model.encode_image(images) @ model.encode_text(texts).T)
    for i in range(2):
        for j, share in enumerate(model.match([images[i]] * 2, texts).tolist()):
            line = next(line for line in printed.splitlines() if f"{cosines[i, j]:.3f}" in line)
            assert texts[j] in line and f"{100 * share:.1f} %" in line
    refused(["match", "vqa", *flags], "vqa: this albef does not match; it can answer", capsys)
    refused(["match", "retrieval", "images/9.png", "--text", "a"], "images/9.png: no such image", capsys)


def test_answer_ranks_a_list_or_writes(here, models, capsys):
    flags = ["answer", "vqa", "images/0.png", "--question", QUESTIONS[0], "--question", QUESTIONS[1]]
    assert cli.main([*flags, "--answers", write("list.json", ANSWERS), "--top", "2"]) == 0
    printed = capsys.readouterr().out
    for question, ranked in zip(QUESTIONS, models["vqa"].answer([picture(0)] * 2, QUESTIONS, ANSWERS, top=2)):
        assert question in printed
        for name, share in ranked:
            assert any(name in line and f"{100 * share:.1f} %" in line for line in printed.splitlines())
    assert cli.main([*flags, "--answers", "red,blue"]) == 0
    assert sum("%" in line for line in capsys.readouterr().out.splitlines()) == 4
    assert cli.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    for question, written in zip(QUESTIONS, models["vqa"].answer([picture(0)] * 2, QUESTIONS)):
        assert any(question in line and written in line for line in lines)
    refused([*flags, "--answers", "red"], "--answers red: a .json file, or at least two answers", capsys)
    refused(["answer", "retrieval", *flags[2:]], "does not answer; it can match, retrieve, ground", capsys)
    refused(["caption", "vqa", "images/0.png"], "does not caption", capsys)


def test_ground_stores_a_picture_and_prints_the_box(here, models, capsys):
    assert cli.main(["ground", "retrieval", "images/1.png", "--text", "the red hen", "--out", "out.png"]) == 0
    line, path = capsys.readouterr().out.splitlines()
    expected = models["retrieval"].ground(picture(1), "the red hen")
    x, y, width, height = (f"{value:.0f}" for value in expected.box)
    assert (
        line == f"the red hen: x {x}, y {y}, width {width}, height {height} (match {100 * expected.probability:.1f} %)"
    )
    assert path == "out.png" and np.asarray(Image.open("out.png")).std() > 10
    refused(["ground", "retrieval", "images/1.png", "--text", "a", "--block", "7"], "block=7: layers whose", capsys)


def test_retrieve_reranks_by_either_formula(here, models, capsys):
    model = models["retrieval"]
    os.makedirs("searched/all")
    for i in range(7):
        os.rename(f"images/{i}.png", f"searched/all/{i}.png")
    images = [np.asarray(Image.open(f"searched/all/{i}.png")) for i in range(7)]
    flags = ["retrieve", "retrieval", "--text", "two hens", "--folder", "searched", "-k", "3", "--rerank", "5"]
    for formula, add in ((None, False), ("itm", False), ("itm+similarity", True)):
        assert cli.main(flags if formula is None else [*flags, "--formula", formula]) == 0
        printed = capsys.readouterr().out
        assert ("ITM logit + cosine" if add else "ITM logit") in printed and pathlib.Path("retrieved.png").is_file()
        lines = [line for line in printed.splitlines() if "all/" in line]
        for line, (i, score) in zip(lines, model.retrieve(["two hens"], images, 3, 5, add)[0], strict=True):
            assert f"all/{i}.png" in line and f"{score:.3f}" in line
    image = ["retrieve", "retrieval", "--image", "images/0.jpg", "--folder", "searched"]
    refused([*image, "--rerank", "5"], "--rerank: the ITM head compares a text with images", capsys)
    refused([*image, "--formula", "itm"], "--formula: the score of --rerank K", capsys)


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_vqa_against_the_answers_in_the_list(here, models, capsys):
    judged = zip(QUESTIONS, (["a hen"] * 10, ["two"] * 3 + ["no"] * 7))
    entries = [
        {"dataset": "vqa", "image": f"{i}.png", "question": question, "question_id": 10 + i, "answer": answers}
        for i, (question, answers) in enumerate(judged)
    ]
    data, answers = write("vqa_val.json", entries), write("answer_list.json", ANSWERS)
    flags = ["evaluate", "vqa", "--task", "vqa", "--data", data, "--images", "images"]
    assert cli.main([*flags, "--answers", answers, "--k", "4"]) == 0
    printed = capsys.readouterr().out
    assert "formula log p(all tokens) + log p(first token)" in printed and "k 4" in printed
    ranked = models["vqa"].answer([picture(0), picture(1)], QUESTIONS, ANSWERS, k=4)
    predictions = [row[0][0] for row in ranked]
    expected = np.mean([
        accuracy(comparable(entry["answer"]).count(normalised(text)), 10) for text, entry in zip(predictions, entries)
    ])  # fmt: skip
    assert scores("vqa")["accuracy"] == pytest.approx(100 * expected)
    submission = json.loads(pathlib.Path("evaluations/vqa_predictions.json").read_text())
    assert submission == [{"question_id": 10 + i, "answer": text} for i, text in enumerate(predictions)]
    assert facts("vqa")["k"] == 4 and facts("vqa")["answers"] == "ranked, of 6"
    # Written answers, and the official annotations in place of the list's.
    official = [
        {"question_id": 10 + i, "image_id": i, "answers": [{"answer": "red"}] * 10, "answer_type": "other"}
        for i in range(2)
    ]
    assert cli.main([*flags, "--annotations", write("official.json", {"annotations": official})]) == 0
    written = models["vqa"].answer([picture(0), picture(1)], QUESTIONS)
    assert scores("vqa")["accuracy"] == scores("vqa")["accuracy_answer_other"] == 50 * sum(t == "red" for t in written)
    # Nobody's answers are known: the predictions alone.
    os.remove("evaluations/vqa.json")
    test = write("vqa_test.json", [{name: one[name] for name in one if name != "answer"} for one in entries])
    assert cli.main(["evaluate", "vqa", "--task", "vqa", "--data", test, "--images", "vqa=images"]) == 0
    assert "no scores" in capsys.readouterr().out and not os.path.exists("evaluations/vqa.json")


@pytest.mark.parametrize("task", ["nlvr2", "entailment"])
def test_classes_of_pairs(here, models, task):
    labels = {"nlvr2": ["True", "False"], "entailment": ["entailment", "neutral", "contradiction"]}[task]
    entries = [
        {"images": [f"{i}.png", f"{i + 1}.png"], "image": i, "sentence": CAPTIONS[i], "label": labels[i % len(labels)]}
        for i in range(N)
    ]
    assert (
        cli.main(["evaluate", task, "--task", task, "--data", write("list.json", entries), "--images", "images"]) == 0
    )
    if task == "nlvr2":
        pairs = [picture(i) for i in range(N)], CAPTIONS[:N], [picture(i + 1) for i in range(N)]
    else:
        pairs = [picture(i, "jpg") for i in range(N)], CAPTIONS[:N]
    predicted = [row[0][0] for row in models[task].classify_pairs(*pairs)]
    right = [name == entry["label"] for name, entry in zip(predicted, entries)]
    assert scores(task)["accuracy"] == pytest.approx(100 * np.mean(right))
    assert json.loads(pathlib.Path(f"evaluations/{task}_predictions.json").read_text()) == predicted


def test_retrieval_in_two_stages(here, models, capsys):
    """Five images, two of which have two captions; R@1 against every pair scored apart."""
    captions = [CAPTIONS[:2], CAPTIONS[2:3], CAPTIONS[3:4], CAPTIONS[4:5], CAPTIONS[5:7]]
    entries = [{"image": f"{i}.png", "caption": texts} for i, texts in enumerate(captions)]
    flags = ["evaluate", "retrieval", "--task", "retrieval"]
    flags += ["--data", write("test.json", entries), "--images", "images"]
    model, owner = models["retrieval"], np.repeat(np.arange(N), [2, 1, 1, 1, 2])
    images = [picture(i) for i in range(N)]
    cosines = np.asarray(model.encode_image(images) @ model.encode_text(CAPTIONS).T)
    itm = np.asarray([model.pair_logits("itm_logits", CAPTIONS, 32, [image] * len(CAPTIONS))[:, 1] for image in images])

    def recalls(matrix: np.ndarray) -> list[float]:
        best = owner[matrix.argmax(1)] == np.arange(N)
        return [100 * best.mean(), 100 * (matrix.argmax(0) == owner).mean()]

    for extra, matrix, formula in (
        ([], itm, "ITM logit"),
        (["--formula", "itm+similarity"], itm + cosines, "ITM logit + similarity"),
        (["--k", "0"], cosines, "similarity"),
    ):
        assert cli.main([*flags, *extra]) == 0
        assert f"formula {formula}" in capsys.readouterr().out and facts("retrieval")["formula"] == formula
        recalled = (scores("retrieval")[f"{way}_R@1"] for way in ("image_to_text", "text_to_image"))
        assert list(recalled) == pytest.approx(recalls(matrix))
    # A shortlist of one leaves the first stage's order.
    assert cli.main([*flags, "--k", "1"]) == 0
    assert scores("retrieval")["text_to_image_R@1"] == pytest.approx(recalls(cosines)[1])
    assert cli.main([*flags, "--limit", "2"]) == 0
    assert facts("retrieval")["images"] == 2 and from_json(json.dumps(facts("retrieval")))["text_to_image_R@1"].n == 3


def refer_folder(root: pathlib.Path, refs: Any) -> str:
    (root / "refcoco+").mkdir(exist_ok=True)
    images = [{"id": i, "height": 20 + i, "width": 30 - i} for i in range(N)]
    boxes = [{"id": 100 + i, "bbox": [2.0, 3.0, 10.0 + i, 9.0]} for i in range(N)]
    (root / "refcoco+" / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    (root / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return "refcoco+"


REFS = [
    {"ref_id": 7 + i, "ann_id": 100 + i, "image_id": i, "split": "val" if i < 3 else "testA", "sent_ids": [1]}
    for i in range(N)
]


def test_grounding_by_proposed_boxes(here, models, capsys):
    entries = [{"image": f"{i}.png", "text": CAPTIONS[i], "ref_id": 7 + i} for i in range(N)]
    proposals = {str(i): [[2, 3, 10 + i, 9, 0.9], [0, 0, 12, 12], [10, 8, 8, 8]] for i in range(N)}
    flags = ["evaluate", "retrieval", "--task", "grounding", "--images", "images"]
    flags += ["--data", write("refcoco+_val.json", entries[:3]), write("refcoco+_test.json", entries[3:])]
    flags += ["--refer", refer_folder(here, REFS), "--proposals", write("dets.json", proposals)]
    assert cli.main(flags) == 0
    assert "block 1" in capsys.readouterr().out
    maps, _ = models["retrieval"].heat_maps([picture(i) for i in range(N)], CAPTIONS[:N])
    referred = [
        Referred(
            (2, 3, 10 + i, 9), np.array([box[:4] for box in proposals[str(i)]]), (20 + i, 30 - i), REFS[i]["split"], i
        )
        for i in range(N)
    ]
    expected, _ = grounding_scores(maps, referred)
    assert scores("grounding") == {name: score.value for name, score in expected.items()}
    write("dets.json", {key: proposals[key] for key in "0123"})
    refused(flags, "ref_id 11 has no proposed boxes for its image 4", capsys)
    refer_folder(here, REFS[1:])
    refused(flags, "ref_id 7 has no annotated object", capsys)


class Code:
    def __reduce__(self):
        return os.system, ("touch run",)


def test_references_and_proposals_are_read_without_running_code(here):
    refer_folder(here, REFS)
    references = read_references("refcoco+")
    assert len(references) == N and references[8] == ("val", 1, (2.0, 3.0, 11.0, 9.0), (21, 29))
    (here / "refcoco+" / "refs(unc).json").write_text(json.dumps(REFS))
    assert read_references("refcoco+") == references
    os.remove("refcoco+/refs(unc).json")
    for refs, message in (
        ([Code()], "it contains posix.system"),
        ([{**REFS[0], "ann_id": 5}], r"refs\(unc\).p\[0\] does not fit"),
    ):
        refer_folder(here, refs)
        with pytest.raises(MmjaxError, match=message):
            read_references("refcoco+")
    assert not os.path.exists("run")
    (here / "refcoco+" / "refs(unc).p").write_bytes(b"\x80\x02]q")
    with pytest.raises(MmjaxError, match=r"refs\(unc\).p: not a list of plain values"):
        read_references("refcoco+")
    with pytest.raises(MmjaxError, match="none of refs"):
        read_references("images")
    for content, message in (([], "an object of boxes"), ({"3": [[1, 2, 0, 4]]}, "image 3 has a box without an area")):
        with pytest.raises(MmjaxError, match=message):
            read_proposals(write("dets.json", content))


ENTRY = {"image": "0.png", "caption": "a hen"}
ABSENT = [ENTRY, {**ENTRY, "image": "8.png"}, {**ENTRY, "image": "9.png"}]
QUESTION = {"dataset": "vqa", "image": "0.png", "question": "what", "question_id": 3}
PAIR = {"images": ["0.png", "1.png"], "sentence": "a", "label": "True"}


@pytest.mark.parametrize(
    "model, task, entries, extra, message",
    [
        ("retrieval", "retrieval", ABSENT, [], "2 images are missing: images/8.png"),
        ("retrieval", "retrieval", [ENTRY, {"image": "1.png"}], [], "test.json[1]: no text"),
        ("retrieval", "retrieval", [ENTRY], ["--answers", "a.json"], "--task retrieval has no use for --answers"),
        ("retrieval", "retrieval", [ENTRY], ["--k", "-1"], "--k -1: at least 0"),
        ("retrieval", "retrieval", [ENTRY], ["--limit", "0"], "limit=0: should be at least 1"),
        ("vqa", "retrieval", [ENTRY], [], "this albef has no features of images and texts"),
        ("vqa", "captions", [ENTRY], [], "this albef writes no captions"),
        ("retrieval", "vqa", [QUESTION], [], "this albef answers no questions"),
        ("vqa", "vqa", [{**QUESTION, "dataset": "vg"}], ["--images", "vqa=images"], "list: unknown dataset"),
        ("vqa", "vqa", [QUESTION], ["--annotations", "official.json"], "1 questions have no human answers"),
        ("entailment", "nlvr2", [PAIR], [], "texts of 2 images; this albef classifies those of 1"),
        ("vqa", "nlvr2", [PAIR], [], "has no head of classes of pairs"),
        ("retrieval", "grounding", [{**ENTRY, "ref_id": 1}], [], "--task grounding: --refer DIR"),
        ("retrieval", "knn", [ENTRY], [], "--images: of --data FILES with --task vqa, nlvr2"),
    ],
)
def test_what_does_not_fit_is_one_message(here, capsys, model, task, entries, extra, message):
    write("official.json", {"annotations": [{"question_id": 1, "answers": [{"answer": "red"}] * 2}]})
    data = write("test.json", entries)
    images = [] if "--images" in extra else ["--images", "images"]
    refused(["evaluate", model, "--task", task, "--data", data, *images, *extra], message, capsys)


def test_an_exported_model_is_evaluated_and_its_step_is_named(models, tmp_path, monkeypatch, capsys):
    """Through `mmjax.load`: the same scores as of the model in memory, and the layout in the facts."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save("0.png")
    mmjax.save(dataclasses.replace(models["retrieval"]), tmp_path / "saved")
    data = write("test.json", [ENTRY, {**ENTRY, "caption": "the sea"}])
    assert cli.main(["evaluate", "saved", "--task", "retrieval", "--data", data]) == 0
    assert facts("retrieval")["model"] == "saved" and facts("retrieval")["step"] is None
    assert facts("retrieval")["data"] == [str(tmp_path / "test.json")]
