"""Flamingo's evaluation by the number of examples: prompts, selection, stored predictions, and the command."""

import json
import pathlib

import numpy as np
import pytest
import tiny_flamingo as tiny
from PIL import Image

from mmjax import cli, hub
from mmjax.data.image_text import ImageTextList
from mmjax.data.scenes.files import write_scenes
from mmjax.data.task_lists import QuestionList
from mmjax.errors import MmjaxError
from mmjax.evaluation.report import from_json
from mmjax.evaluation.vqa import normalised
from mmjax.interface import protocols
from mmjax.interface.few_shot import CAPTIONS, QUESTIONS, FewShot
from mmjax.interface.shots import by_shots, examples_of, fingerprint
from mmjax.models.flamingo.tasks import FlamingoModel

IMAGE, END = "<image>", "<|endofchunk|>"


@pytest.fixture(scope="module")
def model() -> FlamingoModel:
    return tiny.trained()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> pathlib.Path:
    """A folder with train/ (six records) and test/ (three)."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "train", 6, "train", size=32)
    write_scenes(folder / "test", 3, "validation", size=32)
    return folder


def captions(scenes: pathlib.Path, split: str) -> ImageTextList:
    return ImageTextList(scenes / split / "captions.json")


def questions(scenes: pathlib.Path, split: str) -> QuestionList:
    return QuestionList(scenes / split / "questions.json", {"scenes": scenes / split})


def test_zero_shots_are_two_examples_of_text_alone(model, scenes):
    """The ids, one by one; the answers are those of the whole text with one image."""
    support = questions(scenes, "train")
    examples = examples_of(support)
    assert [example.answer for example in examples] == [entry["answer"][0] for entry in support.records()]
    few_shot = FewShot(model, examples, QUESTIONS, 0, "shared", seed=1)
    (first, second), *_ = few_shot.select([None])
    [prompt] = few_shot.prompts([None], ["what is it?"])
    texts = [f"Question:{examples[i].question} Short answer:{examples[i].answer}" for i in (first, second)]
    assert prompt == f"{texts[0]}{END}\n{texts[1]}{END}\n{IMAGE}Question:what is it? Short answer:"
    encode = lambda text: model.tokenizer.encode([text], False)[0]  # noqa: E731
    begin = model.tokenizer.encode([""])[0][:1] if model.tokenizer.encode(["a"])[0] != encode("a") else []
    c, parts = model.config, [encode(text) for text in (*texts, "Question:what is it? Short answer:")]
    newline = encode(f"{END}\n")[1:]
    expected = [*begin, *parts[0], c.end_of_chunk, *newline, *parts[1], c.end_of_chunk, *newline]
    expected += [c.image_token, *parts[2]]
    assert model.tokenizer.encode([prompt])[0] == expected
    result = by_shots(model, questions(scenes, "test"), support, (0,), seed=1, limit=2)[0]
    assert result.facts["prompt"].startswith(f"{texts[0]}{END}\n{texts[1]}{END}\n{IMAGE}Question:")
    entries = [questions(scenes, "test")[i] for i in range(2)]
    whole = [prompt.replace("what is it?", entry["text"]) for entry in entries]
    files = [str(scenes / "test" / "questions" / f"{i}.png") for i in range(2)]
    options = {"max_new_tokens": 5, "num_beams": 3, "length_penalty": 0.0}
    answers = model.generate(whole, images=files, **options)
    assert list(result.predictions) == [QUESTIONS.cleaned(text) for text in answers]


def test_a_shared_prefix_gives_the_captions_of_whole_prompts(model, scenes, monkeypatch):
    """Two shots: from one cache for all queries, and from prompts with all their images. Fewer shots are the first."""
    encoded = []
    whole_prefix = FlamingoModel.encode_prefix

    def counted(self, text, images=None, add_special_tokens=True):
        encoded.append(text)
        return whole_prefix(self, text, images, add_special_tokens)

    monkeypatch.setattr(FlamingoModel, "encode_prefix", counted)
    monkeypatch.setattr(protocols, "CHUNK", 2)
    source, support = captions(scenes, "test"), captions(scenes, "train")
    series = by_shots(model, source, support, (1, 2), seed=3)
    assert len(encoded) == 2 and encoded[1].startswith(encoded[0])
    monkeypatch.undo()
    examples = examples_of(support)
    order = FewShot(model, examples, CAPTIONS, 2, "shared", 3).select([None])[0]
    assert order != [0, 1]
    start = "".join(f"{IMAGE}Output:{examples[i].answer}{END}\n" for i in order)
    assert encoded[1] == start
    queries = [str(path) for i in range(3) for path in source.image_paths(i)]
    lists = [[*(examples[i].image for i in order), query] for query in queries]
    options = {"max_new_tokens": 20, "num_beams": 3, "length_penalty": 0.0}
    whole = model.generate([f"{start}{IMAGE}Output:"] * 3, images=lists, **options)
    assert list(series[2].predictions) == [CAPTIONS.cleaned(text) for text in whole]
    assert series[2].scores["cider"].n == 3 and series[2].facts["shots"] == 2


def test_rices_has_the_nearest_image_last(model, scenes):
    """Against cosines in NumPy of CLIP's own features."""
    source, support = captions(scenes, "test"), captions(scenes, "train")
    examples = examples_of(support)
    features = [
        np.asarray(tiny.clip().encode_image([str(x.image_paths(i)[0]) for i in range(len(x))]), np.float64)
        for x in (support, source)
    ]
    support_features, query_features = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in features)
    expected = np.argsort(query_features @ support_features.T, axis=1)[:, -2:]
    queries = [str(source.image_paths(i)[0]) for i in range(3)]
    few_shot = FewShot(model, examples, CAPTIONS, 4, "rices").with_shots(2)
    np.testing.assert_array_equal(few_shot.select(queries), expected)
    result = by_shots(model, source, support, (2,), "rices", limit=1)[2]
    first, last = (f"{IMAGE}Output:{examples[i].answer}{END}\n" for i in expected[0])
    assert result.facts["prompt"] == f"{first}{last}{IMAGE}Output:"


def test_a_second_run_goes_on_behind_the_stored_predictions(model, scenes, tmp_path, monkeypatch):
    """A sample for each query does not depend on the interruption; other settings begin anew."""
    source, support = captions(scenes, "test"), captions(scenes, "train")
    whole = by_shots(model, source, support, (1,), "random", seed=5)[1]
    monkeypatch.setattr(protocols, "CHUNK", 2)

    def interrupted(starts):
        for number, start in enumerate(starts):
            if number:
                raise KeyboardInterrupt
            yield start

    with pytest.raises(KeyboardInterrupt):
        by_shots(model, source, support, (1,), "random", seed=5, folder=tmp_path, track=interrupted)
    file = tmp_path / "1_shots.jsonl"
    stored = file.read_text().splitlines()
    assert [json.loads(line) for line in stored[1:]] == list(whole.predictions)[:2]
    assert json.loads(stored[0])["weights"] == fingerprint(model.variables) != fingerprint(tiny.fresh().variables)
    stored[1] = json.dumps("as it was stored")
    file.write_text("\n".join(stored) + "\n")
    resumed = by_shots(model, source, support, (1,), "random", seed=5, folder=tmp_path)[1]
    assert list(resumed.predictions) == ["as it was stored", *list(whole.predictions)[1:]]
    other = by_shots(model, source, support, (1,), "random", seed=6, folder=tmp_path)[1]
    assert "as it was stored" not in other.predictions and len(file.read_text().splitlines()) == 4


@pytest.fixture
def here(model, scenes, tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setattr(hub, "load", lambda source, **_: {"flamingo": model, "clip": tiny.clip()}[source])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def flags(scenes: pathlib.Path, *more: str, source: str = "flamingo", task: str = "vqa") -> list[str]:
    name = {"vqa": "questions", "captions": "captions"}[task]
    data, support = (str(scenes / split / f"{name}.json") for split in ("test", "train"))
    images = ["--images", f"scenes={scenes / 'test'}", "--support_images", f"scenes={scenes / 'train'}"]
    images = images if task == "vqa" else []
    return ["evaluate", source, "--task", task, "--data", data, "--support", support, *images, *more]


def test_the_command_writes_a_table_a_plot_and_the_predictions(here, scenes, model, capsys):
    assert cli.main(flags(scenes, "--shots", "1,0", "--rices")) == 0
    printed = capsys.readouterr().out
    file = here / "evaluations" / "vqa_shots.json"
    scores, facts = from_json(file.read_text()), json.loads(file.read_text())
    series = by_shots(model, questions(scenes, "test"), questions(scenes, "train"), (0, 1), "rices")
    entries = [questions(scenes, "test")[i] for i in range(3)]
    for k, result in series.items():
        right = sum(normalised(text) == entry["answers"][0] for text, entry in zip(result.predictions, entries))
        assert scores[f"{k}_shots_accuracy"].value == pytest.approx(100 * right / 3)
        assert f"{result.scores['accuracy'].value:.2f} [" in printed
        submission = json.loads((here / "evaluations" / f"vqa_{k}_shots_predictions.json").read_text())
        assert submission == [{"question_id": i, "answer": text} for i, text in enumerate(result.predictions)]
        assert facts["shots"][str(k)]["selection"] == "rices" and facts["shots"][str(k)]["seed"] == 42
    with Image.open(here / "evaluations" / "vqa_shots.png") as plot:
        assert plot.size == (600, 360)


@pytest.mark.parametrize(
    ("more", "source", "task", "message"),
    [
        (["--shots", "4,x"], "flamingo", "captions", "--shots 4,x: numbers of examples, such as 0,4,8"),
        (["--shots", "7"], "flamingo", "captions", "shots=(7,) of 6 examples in captions.json"),
        (["--shots", "1", "--rices", "--per_query"], "flamingo", "captions", "--rices and --per_query"),
        (["--shots", "1", "--k", "3"], "flamingo", "vqa", "--answers and --k have no use"),
        (["--rices"], "flamingo", "captions", "--support, --rices: of --shots 0,4,8"),
        (["--shots", "1"], "clip", "captions", "this clip takes no examples in its prompts"),
    ],
)
def test_refusals(here, scenes, capsys, more, source, task, message):
    assert cli.main(flags(scenes, *more, source=source, task=task)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_lists_that_do_not_fit(model, scenes):
    with pytest.raises(MmjaxError, match="one has questions, the other captions"):
        by_shots(model, captions(scenes, "test"), questions(scenes, "train"), (1,))
    with pytest.raises(MmjaxError, match=r"6 of its images are in captions\.json too"):
        by_shots(model, captions(scenes, "train"), captions(scenes, "train"), (1,))
