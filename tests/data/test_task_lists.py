"""Annotation files of VQA, NLVR2, SNLI-VE and captions, from the JSON to batches of one shape."""

import functools
import json
import pickle

import numpy as np
import pytest
from hostile_images import encode

from mmjax.data.caption_text import CleanText, EncodeAnswers, EncodeCaption
from mmjax.data.decoding import BadRecord
from mmjax.data.image_pairs import OnEach, SwapImages
from mmjax.data.image_text import ImageTextList
from mmjax.data.pipeline import Pipeline
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.task_lists import EntailmentList, ImagePairList, QuestionList, read_answers
from mmjax.data.transforms import Decode, Keep, RandomFlip, RandomResizedCrop, Resize
from mmjax.data.vision_language_augment import VisionLanguageRandAugment
from mmjax.data.webdataset import WebDataset
from mmjax.errors import MmjaxError
from mmjax.text.captions import albef_caption, albef_question, blip_caption, exchange_sides
from mmjax.text.training import train_wordpiece


def generator(seed=0):
    return np.random.default_rng(seed)


def picture(value):
    return encode(np.full((23, 29, 3), value, np.uint8))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """coco/1.png to coco/4.png, genome/1.png, each of one grey; and coco/broken.jpg."""
    root = tmp_path_factory.mktemp("images")
    for folder, count in (("coco", 4), ("genome", 1)):
        (root / folder).mkdir()
        for i in range(1, count + 1):
            (root / folder / f"{i}.png").write_bytes(picture(10 * i + (100 if folder == "genome" else 0)))
    (root / "coco" / "9.jpg").write_bytes(picture(90))
    (root / "coco" / "broken.jpg").write_bytes(b"<html>")
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["the red hen is left of a blue box , what colour ? yes no two"] * 3, 90)


def write(tmp_path, name, records):
    (tmp_path / name).write_text(json.dumps(records))
    return tmp_path / name


TRAIN = [
    {
        "dataset": "vqa",
        "image": "1.png",
        "question_id": 393225000,
        "question": "What's left, red?",
        "answer": ["yes", "no", "yes", "yes"],
    },
    {"dataset": "vqa", "image": "2.png", "question_id": 5, "question": "Two?", "answer": ["two"] * 10},
]
GENOME = [{"dataset": "vg", "image": "1.png", "question_id": 7, "question": "What colour?", "answer": "red hen"}]


def test_questions_of_vqa_and_visual_genome(tmp_path, root):
    files = [write(tmp_path, "vqa_train.json", TRAIN), write(tmp_path, "vg_qa.json", GENOME)]
    folders = {"vqa": root / "coco", "vg": root / "genome"}
    source = QuestionList(files, folders)
    assert len(source) == 3
    first = source[0]
    assert first == {
        "text": "What's left, red?",
        "question_id": 393225000,
        "answers": ("yes", "no"),
        "answer_weights": (0.75, 0.25),
        "image": picture(10),
    }
    assert source[1]["answers"] == ("two",) and source[1]["answer_weights"] == (1.0,)
    assert (source[2]["answers"], source[2]["answer_weights"]) == (("red hen",), (0.5,))  # ALBEF's
    assert source[2]["image"] == picture(110)
    assert QuestionList(files, folders, alone=0.2)[2]["answer_weights"] == (0.2,)  # BLIP's
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    test = {key: value for key, value in TRAIN[0].items() if key != "answer"}
    assert set(QuestionList(write(tmp_path, "vqa_test.json", [test]), folders)[0]) == {"image", "text", "question_id"}


def test_questions_are_batched(tmp_path, root, tokenizer):
    files = [write(tmp_path, "vqa_train.json", TRAIN), write(tmp_path, "vg_qa.json", GENOME)]
    source = QuestionList(files, {"vqa": root / "coco", "vg": root / "genome"})
    transforms = (
        Resize(ImagePreprocessing.albef(8)),
        CleanText(albef_question),
        EncodeCaption(tokenizer, 25, sep=False),
        EncodeAnswers(tokenizer, slots=3, length=7),
    )
    batch = next(iter(Pipeline(source, 3, shuffle=False, transforms=transforms)))
    assert batch["question_id"].tolist() == [393225000, 5, 7]
    np.testing.assert_array_equal(batch["answer_weights"], np.float32([[0.75, 0.25, 0], [1, 0, 0], [0.5, 0, 0]]))
    assert {name: batch[name].shape for name in ("input_ids", "answer_ids", "answer_mask")} == {
        "input_ids": (3, 25),
        "answer_ids": (3, 3, 7),
        "answer_mask": (3, 3, 7),
    }
    read = [tokenizer.decode(row) for row in batch["input_ids"]]
    assert read == ["whats left red", "two", "what colour"]
    assert [tokenizer.decode(row) for row in batch["answer_ids"][:, 0]] == ["yes", "two", "red hen"]
    assert not (batch["input_ids"] == tokenizer.sep).any()
    assert batch["image"][:, 0, 0, 0].tolist() == [10, 20, 110]
    with pytest.raises(BadRecord, match="answer: missing"):
        EncodeAnswers(tokenizer).map({"text": "x"})
    with pytest.raises(MmjaxError, match="slots=0"):
        EncodeAnswers(tokenizer, slots=0)


def test_the_list_of_answers(tmp_path):
    assert read_answers(write(tmp_path, "answer_list.json", ["yes", "no"])) == ("yes", "no")
    for content, word in (({}, "expected a list"), ([], "expected a list"), (["yes", " "], r"\[1\]: ' ' is no answer")):
        with pytest.raises(MmjaxError, match=r"answer_list\.json.*" + word):
            read_answers(write(tmp_path, "answer_list.json", content))
    with pytest.raises(MmjaxError, match=r"gone\.json"):
        read_answers(tmp_path / "gone.json")


PAIR = {"images": ["1.png", "2.png"], "sentence": "The left one is right.", "label": "True"}


def test_pairs_of_images(tmp_path, root):
    source = ImagePairList(write(tmp_path, "nlvr.json", [PAIR, PAIR | {"label": "False"}]), root / "coco")
    expected = {"image_0": picture(10), "image_1": picture(20), "text": PAIR["sentence"], "label": 1}
    assert source[0] == expected and source[1]["label"] == 0


def test_pairs_are_augmented_apart_and_swapped_half_the_time(tmp_path, root, tokenizer):
    source = ImagePairList(write(tmp_path, "nlvr.json", [PAIR]), root / "coco")
    clean = CleanText(functools.partial(blip_caption, words=40))
    record = clean.map(OnEach(Decode()).random_map(source[0], generator()))
    assert record["text"] == "the left one is right"
    swapped = []
    for seed in range(400):
        got = SwapImages().random_map(record, generator(seed))
        swapped.append(got["image_0"][0, 0, 0] == 20)
        assert got["image_1"][0, 0, 0] == (10 if swapped[-1] else 20)
        assert got["text"] == (exchange_sides(record["text"]) if swapped[-1] else record["text"])
        assert got["label"] == 1
    assert 150 < sum(swapped) < 250  # five standard deviations
    noise = generator(3).integers(0, 256, (23, 29, 3), np.uint8)
    crop = OnEach(RandomResizedCrop(8)).random_map({"image_0": noise, "image_1": noise, "label": 0}, generator())
    assert crop["label"] == 0 and set(crop) == {"image_0", "image_1", "label"}
    assert not np.array_equal(crop["image_0"], crop["image_1"])
    transforms = (OnEach(RandomResizedCrop(8)), OnEach(RandomFlip()), clean, SwapImages(), EncodeCaption(tokenizer, 30))
    batch = next(iter(Pipeline(source, 1, transforms=transforms)))
    assert batch["image_0"].shape == batch["image_1"].shape == (1, 8, 8, 3) and batch["label"].tolist() == [1]


def test_entailment(tmp_path, root):
    labels = ("contradiction", "neutral", "entailment")
    records = [{"image": 9, "sentence": "A hen.", "label": label} for label in labels]
    source = EntailmentList(write(tmp_path, "ve.json", [*records, records[0] | {"image": "9"}]), root / "coco")
    assert [source[i]["label"] for i in range(4)] == [0, 1, 2, 0]
    assert source[3] == {"image": picture(90), "text": "A hen.", "label": 0}


@pytest.mark.parametrize(
    "row, reason",
    [
        (TRAIN[0] | {"image": "gone.png"}, "file: missing"),
        (TRAIN[0] | {"image": "../genome/1.png"}, "file: outside the folder"),
        (TRAIN[0] | {"image": None}, "list: no image"),
        (TRAIN[0] | {"dataset": "gqa"}, "list: unknown dataset"),
        (TRAIN[0] | {"question": ["x"]}, "list: no question"),
        (TRAIN[0] | {"question": " "}, "caption: empty"),
        (TRAIN[0] | {"answer": []}, "answer: empty"),
        (TRAIN[0] | {"answer": ["x", ["y"]]}, "answer: empty"),
        (TRAIN[0] | {"answer": None}, "list: no answer"),
        (["x"], "list: not an object"),
    ],
)
def test_errors_name_the_bad_question(tmp_path, root, row, reason):
    source = QuestionList(write(tmp_path, "vqa.json", [TRAIN[1], row]), {"vqa": root / "coco"})
    assert source[0]["text"] == "Two?"
    with pytest.raises(BadRecord) as caught:
        source[1]
    assert caught.value.reason == reason
    if not reason.startswith("file"):
        assert caught.value.name == f"{tmp_path / 'vqa.json'}[1]"


@pytest.mark.parametrize(
    "kind, row, reason",
    [
        (ImagePairList, PAIR | {"images": ["1.png"]}, "list: no images"),
        (ImagePairList, PAIR | {"images": ["1.png", 2]}, "list: no images"),
        (ImagePairList, PAIR | {"images": ["1.png", "gone.png"]}, "file: missing"),
        (ImagePairList, PAIR | {"label": "maybe"}, "list: unknown label"),
        (ImagePairList, PAIR | {"sentence": 3}, "list: no sentence"),
        (EntailmentList, {"image": "9", "sentence": "x", "label": "-"}, "list: unknown label"),
        (EntailmentList, {"image": "8", "sentence": "x", "label": "neutral"}, "file: missing"),
        (EntailmentList, {"sentence": "x", "label": "neutral"}, "list: no image"),
    ],
)
def test_errors_name_the_bad_row_of_other_tasks(tmp_path, root, kind, row, reason):
    with pytest.raises(BadRecord) as caught:
        kind(write(tmp_path, "list.json", [row]), root / "coco")[0]
    assert caught.value.reason == reason and caught.value.name


def test_missing_and_broken_images_are_counted(tmp_path, root, tokenizer):
    """ALBEF's pre-training from two files, of which one has ids; two of twelve images cannot be read."""
    names = [f"{i % 4 + 1}.png" for i in range(10)]
    pairs = [{"image": name, "caption": ["the red hen", "a box!"], "image_id": i} for i, name in enumerate(names)]
    others = [{"image": "gone.jpg", "caption": "hen"}, {"image": "broken.jpg", "caption": "hen"}]
    files = [write(tmp_path, "coco.json", pairs), write(tmp_path, "web.json", [*others, *pairs[:2]])]
    for row in (others := json.loads(files[1].read_text())):
        row.pop("image_id", None)
    write(tmp_path, "web.json", others)
    transforms = (
        RandomResizedCrop(16, (0.2, 1.0), resample="bicubic"),
        RandomFlip(),
        VisionLanguageRandAugment(7),
        CleanText(albef_caption),
        EncodeCaption(tokenizer, 25, sep=False),
    )
    keep = Keep(("image", "text", "texts"))
    source = ImageTextList(files, root / "coco")
    pipeline = Pipeline(source, 7, epochs=1, transforms=(keep, *transforms), max_bad_fraction=0.2)
    iterator = iter(pipeline)
    batches = list(iterator)
    assert len(batches) == 2 and batches[0].keys() == {"image", "input_ids", "attention_mask", "index"}
    assert iterator.bad_counts == {"file: missing": 1, "image: not an image": 1}
    assert {tokenizer.decode(row) for batch in batches for row in batch["input_ids"]} == {"the red hen", "a box"}
    without = Pipeline(source, 14, shuffle=False, transforms=transforms, max_bad_fraction=0.2)
    with pytest.raises(MmjaxError, match=r"'image_id' must be a number in every record.*web\.json\[\d\] has None"):
        next(iter(without))


def test_captioning_puts_the_prompt_in_front_and_draws_a_caption(tokenizer):
    record = CleanText(blip_caption).map({"text": "A Hen!", "texts": ("A Hen!", "Two, yes.")})
    assert record["texts"] == ("a hen", "two, yes") and record["text"] == "a hen"
    prompted = EncodeCaption(tokenizer, 20, template="a box {}", several=False)
    assert tokenizer.decode(prompted.random_map(record, generator())["input_ids"]) == "a box a hen"
    sampled = [EncodeCaption(tokenizer, 20).random_map(record, generator(seed))["input_ids"][1] for seed in range(200)]
    counts = np.unique(sampled, return_counts=True)[1]
    assert len(counts) == 2 and counts.min() > 60
    with pytest.raises(BadRecord, match=r"caption: empty \(nothing is left of '\.\.\.'\)"):
        CleanText(blip_caption).map({"text": "..."})
    with pytest.raises(BadRecord, match="caption: missing"):
        EncodeCaption(tokenizer, 20).random_map({}, generator())


def test_real_pictures_and_captions(shared_dir):
    source = WebDataset(shared_dir / "data" / "stamps" / "stamps.tar", needs=("image", "text"))
    captions = [albef_caption(source[i]["text"]) for i in range(len(source))]
    tokenizer = train_wordpiece(captions, 800)
    transforms = (
        RandomResizedCrop(64, (0.2, 1.0), resample="bicubic"),
        VisionLanguageRandAugment(7),
        CleanText(albef_caption),
        EncodeCaption(tokenizer, 25, sep=False),
    )
    transforms = pickle.loads(pickle.dumps(transforms))  # pickled, as for a worker
    texts_by_index = {}
    for batch in Pipeline(source, 257, epochs=1, transforms=transforms):
        assert batch["image"].shape == (257, 64, 64, 3) and batch["image"].dtype == np.uint8
        texts_by_index |= dict(zip(batch["index"].tolist(), map(tokenizer.decode, batch["input_ids"])))
    assert len(texts_by_index) == 514
    fitting = [i for i, text in enumerate(captions) if len(tokenizer.pieces([text])[0]) <= 24]
    assert len(fitting) > 500 and all(
        texts_by_index[i].replace(" ", "") == captions[i].replace(" ", "") for i in fitting
    )
