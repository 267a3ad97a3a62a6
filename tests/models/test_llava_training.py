"""LLaVA's two stages on a few pictures, from files of conversations to a chat; and what their reader refuses."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from golden.llava import tokenizer_of
from models.tiny_text import chat_tokenizer, random_params
from PIL import Image
from safetensors.numpy import load_file

import mmjax
from mmjax.data.decoding import BadRecord
from mmjax.data.instructions import InstructionList
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.tasks import CLIPModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.tasks import LanguageModel
from mmjax.models.llava.templates import PLACEHOLDER, TEMPLATES, training_template
from mmjax.models.vit.network import ViTConfig
from mmjax.recipes.conversations import EncodeConversation
from mmjax.text.packing import IGNORED
from mmjax.training.checkpoint import load_params
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train
from mmjax.training.lora import LoRAConfig
from mmjax.tree import flatten, tree_hash

EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent.parent / "experiments"
VAULT = SHARED / "golden" / "llava_text.safetensors"
pytestmark = pytest.mark.skipif(not VAULT.is_file(), reason="the vault of LLaVA's texts has the tokenizer")
COLOURS = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (20, 30, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(load_file(VAULT)["inputs/sentencepiece_model"], legacy=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer) -> pathlib.Path:
    """Saved parts, pictures, and the conversations of both stages."""
    folder = tmp_path_factory.mktemp("llava")
    vision = ViTConfig.clip(8, 4, 12, 2, 2, 18)
    clip = CLIPConfig(vision, CLIPTextConfig(7, 31, 12, 1, 2, 18), 7)
    preprocess = ImagePreprocessing.clip(8)
    mmjax.hub.save(CLIPModel(clip, random_params(CLIPModel, clip), preprocess=preprocess), folder / "clip")
    size = {"vocab_size": 520, "kv_heads": 1, "head_width": 8, "bos": 1, "eos": (2,), "pad": 0}
    config = DecoderConfig.llama(16, 2, 2, 24, **size)
    mmjax.hub.save(LanguageModel(config, random_params(LanguageModel, config), tokenizer=tokenizer), folder / "lm")
    for name, colour in COLOURS.items():
        Image.new("RGB", (13, 9), colour).save(folder / f"{name}.png")

    def entry(name, question, answer):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": turns} | ({"image": f"{name}.png"} if "<image>" in question else {})

    captions = [entry(name, "Caption.\n<image>", f"a {name} cup") for name in COLOURS] * 4
    answers = [entry(name, "<image>\nWhat is on the wall?", f"It is {name}.") for name in COLOURS] * 3
    answers += [entry("text", "And the table?", "Two books.")] * 4
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "answers.json").write_text(json.dumps(answers))
    return folder


SMALL = {"batch_size": 4, "log_every": 1, "tensorboard": False, "checkpoint_every": 0}


def run(name, workdir, **fields):
    file = EXPERIMENTS / f"llava_{name}.py"
    config = load_experiment(file)(**SMALL | fields)
    train(config, workdir, experiment_file=str(file))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def first_stage(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("stage1")
    parts = {"init_vision": str(files / "clip"), "init_language": str(files / "lm")}
    losses = run(
        "pretrain", workdir, data=str(files / "captions.json"), length=24, steps=60, learning_rate=3e-2, **parts
    )
    return workdir, losses


def test_the_first_stage_trains_the_connector_alone(files, first_stage):
    workdir, losses = first_stage
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.3
    params = load_params(workdir)["params"]
    assert tree_hash(params["vision"]) == tree_hash(mmjax.load(files / "clip").params["vision"])
    assert tree_hash(params["language"]) == tree_hash(mmjax.load(files / "lm").params)
    assert mmjax.load(workdir).config.template == "vicuna_v1"


def moved(before, after):
    """The parts whose leaves differ."""
    other = flatten(after)
    changed = {path for path, leaf in flatten(before).items() if not np.array_equal(leaf, other[path])}
    return {path.split("/")[0] for path in changed}


def test_the_second_stage_trains_all_but_the_tower_and_resumes(files, first_stage, tmp_path):
    data = {"data": str(files / "answers.json"), "length": 80, "init_from": str(first_stage[0]), "learning_rate": 3e-2}
    losses = run("finetune", tmp_path / "whole", steps=24, **data)
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    start, tuned = mmjax.load(first_stage[0]), mmjax.load(tmp_path / "whole")
    assert moved(start.params, tuned.params) == {"connector", "language"}
    assert tuned.preprocess.pad and isinstance(tuned.chat("What?", images=[files / "red.png"], max_new_tokens=3), str)
    again = run("finetune", tmp_path / "whole", steps=24, **data)  # nothing is left to do
    assert again == losses


def test_the_second_stage_by_adapters(files, first_stage, tmp_path):
    data = {"data": str(files / "answers.json"), "length": 80, "init_from": str(first_stage[0])}
    lora = LoRAConfig(("language/block_*/attention/*", "language/block_*/mlp/*"), 4, 8.0)
    losses = run(
        "finetune", tmp_path, steps=24, tune="lora", learning_rate=3e-2, lora=lora, connector_rate=1e-3, **data
    )
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    params, start = load_params(tmp_path)["params"], mmjax.load(first_stage[0]).params
    assert moved(start, params) == {"connector"}
    adapted = {path.split("/lora_a")[0] for path in flatten(params) if path.endswith("lora_a")}
    assert len(adapted) == 2 * 7 and all(path.startswith("language/block_") for path in adapted)
    assert moved(start, mmjax.load(tmp_path).params) == {"connector", "language"}


def test_sources_that_are_missing_or_of_another_kind(files, first_stage, tmp_path):
    pretrain, finetune = (load_experiment(EXPERIMENTS / f"llava_{name}.py") for name in ("pretrain", "finetune"))
    with pytest.raises(MmjaxError, match="--init_vision MODEL --init_language MODEL"):
        _ = pretrain().network
    with pytest.raises(MmjaxError, match="clip: not a language model with a tokenizer"):
        _ = pretrain(init_vision=str(files / "clip"), init_language=str(files / "clip")).network
    with pytest.raises(MmjaxError, match="lm: not a LLaVA"):
        _ = finetune(init_from=str(files / "lm")).network
    with pytest.raises(MmjaxError, match=r"--data FILE.json"):
        _ = finetune(init_from=str(first_stage[0])).source


# -------------------------------------------------------------------------------------------------------------- records


def conversation(*said, **fields):
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(said)]
    return {"id": "7", "conversations": turns, **fields}


@pytest.mark.parametrize(
    "entry, message",
    [
        (conversation("what?", "a", image="red.png"), "0 times <image> for 1 images: 'what.'"),
        (conversation("<image> what?", "a"), "1 times <image> for 0 images"),
        (conversation("<image>", "a", image="none.png"), "none.png: file: missing"),
        ({"id": "7", "conversations": [{"from": "gpt", "value": "a"}]}, "conversation: order"),
        ({"id": "7", "conversations": [{"from": "cat", "value": "a"}]}, "conversation: no turn"),
        ({"id": "7"}, "list: no conversations"),
    ],
)
def test_entries_that_do_not_fit(files, tmp_path, entry, message):
    (tmp_path / "one.json").write_text(json.dumps([entry]))
    with pytest.raises(BadRecord, match=message) as error:
        _ = InstructionList(tmp_path / "one.json", files)[0]
    assert "id '7'" in str(error.value) or "missing" in message or "list:" in message


def test_both_forms_of_images_and_sharegpt(files, tmp_path):
    share = {
        "id": "s",
        "conversations": [{"from": r, "value": r} for r in ("system", "gpt", "human", "gpt", "human", "gpt")],
    }
    entries = [
        conversation("<image>", "a", image=["red.png"]),
        conversation("<image><image>", "b", image=["red.png"] * 2),
    ]
    (tmp_path / "list.json").write_text(json.dumps([*entries, share]))
    source = InstructionList(tmp_path / "list.json", files)
    assert [len(source[i]["images"]) for i in range(3)] == [1, 2, 0]
    assert source[2]["turns"] == ("human", "gpt", "human", "gpt")


@pytest.fixture
def encode(tokenizer):
    return EncodeConversation(TEMPLATES["v1"], tokenizer, ImagePreprocessing.llava(8), tokens=4, length=90)


def test_answers_alone_are_learned_after_features(encode, files, tokenizer):
    image = (files / "red.png").read_bytes()
    record = {"turns": ("<image>\nWhat is on the table?", "A red cup."), "images": (image,)}
    batch = encode.map(record)
    learned = batch["labels"][batch["labels"] >= 0].tolist()
    assert tokenizer.decode(learned) == "A red cup." and learned[-1] == 2
    assert (
        batch["feature_index"][batch["feature_index"] >= 0].tolist() == [0, 1, 2, 3]
        and (batch["labels"][batch["feature_index"] >= 0] < 0).all()
    )
    assert batch["image"].shape == (1, 8, 8, 3) and batch["attention_mask"].sum() > 40
    example = TEMPLATES["v1"].example(tokenizer, record["turns"], True)
    assert batch["attention_mask"].sum() == len(example.ids) + 3
    text = encode.map({"turns": ("And the wall?", "A clock."), "images": ()})
    assert (text["feature_index"] < 0).all() and not text["image"].any() and (text["labels"] >= 0).any()


def test_samples_without_a_label_are_shown(encode, files):
    image = (files / "red.png").read_bytes()
    record = {"turns": ("<image>\nWhat is on the table?", "A red cup."), "images": (image,)}
    batch = encode.map(record)
    first, last = np.flatnonzero(batch["labels"] >= 0)[0], np.flatnonzero(batch["feature_index"] >= 0)[-1]
    shown = f"no label .*length={first}: .*USER: <image>..What is on the table. ASSISTANT: A red cup"
    with pytest.raises(BadRecord, match=shown):
        dataclasses.replace(encode, length=int(first)).map(record)
    with pytest.raises(BadRecord, match=f"an image is beyond length={last}"):
        dataclasses.replace(encode, length=int(last)).map(record)
    with pytest.raises(BadRecord, match="2 images, pictures=1"):
        encode.map({**record, "images": (image, image)})


def test_batches_of_one_length_and_one_modality(files, first_stage, tmp_path):
    """Less than a tenth is padding; and a state resumes in the middle of an epoch."""
    rng, words = np.random.default_rng(0), ["the", "cup", "and", "two", "red", "books", "on", "a", "wall"]
    entries = []
    for i in range(240):
        answer = " ".join(rng.choice(words, rng.integers(1, 60)))
        entries.append(
            conversation("<image>\nWhat?" if i % 3 else "What?", answer, **({"image": "red.png"} if i % 3 else {}))
        )
    (tmp_path / "many.json").write_text(json.dumps(entries))
    config = load_experiment(EXPERIMENTS / "llava_finetune.py")(
        **SMALL, init_from=str(first_stage[0]), data=str(tmp_path / "many.json"), images=str(files), length=256
    )
    iterator, batches = iter(config.train_data()), []
    for step in range(iterator.pipeline.steps_per_epoch):
        if step == 7:
            state = iterator.get_state()
        batches.append(next(iterator))
    seen = np.concatenate([batch["index"] for batch in batches])
    assert len(set(seen.tolist())) == len(seen) >= 200
    assert all(len(set((batch["feature_index"] >= 0).any(1).tolist())) == 1 for batch in batches)
    masks = [batch["attention_mask"] for batch in batches]
    assert 1 - sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks) < 0.1
    assert len({mask.shape for mask in masks}) > 3
    other = iter(config.train_data())
    other.set_state(state)
    for name, column in next(other).items():
        np.testing.assert_array_equal(column, batches[7][name])


def test_a_tokenizer_that_masks_everything_stops_the_run(files, first_stage, tmp_path):
    """A LLaMA tokenizer of the newer form: the original's counts differ by one, and every label is ignored."""
    tokenizer = tokenizer_of(load_file(VAULT)["inputs/sentencepiece_model"], legacy=False)
    (files / "two.json").write_text(json.dumps([conversation("a?", "b.", "c?", "d.")] * 8))
    config = load_experiment(EXPERIMENTS / "llava_finetune.py")(
        **SMALL, init_from=str(first_stage[0]), data=str(files / "two.json"), length=90, steps=2
    )
    config.__dict__["start"] = config.start.replace(tokenizer=tokenizer)
    with pytest.raises(MmjaxError, match=r"bad records by step 1 .* conversation: no label"):
        next(iter(config.train_data()))


def test_the_features_of_a_row_are_its_own():
    """Rows, and their order in a batch, do not matter to each other; a newline is the one of all."""
    from models.tiny_llava import tiled

    from mmjax.models.vision_language.pretrain import PrefixLM

    model = tiled()
    method = PrefixLM(model.config)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(3, 2, 8, 8, 3)).astype(np.float32)
    index = np.full((3, 12), -1)
    index[0, 2:6], index[1, 1:10], index[1, 10] = np.arange(4), [*range(8), 8], -1  # 8 is the newline
    ids = rng.integers(0, 200, (3, 12))
    batch = {
        "image": image,
        "input_ids": ids,
        "feature_index": index,
        "labels": ids,
        "attention_mask": np.ones_like(ids),
    }
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    logits = jax.jit(method.logits)(model.params, batch)
    order = jnp.asarray([2, 0, 1])
    other = jax.jit(method.logits)(model.params, {name: value[order] for name, value in batch.items()})
    np.testing.assert_allclose(other, logits[order], atol=2e-5)


# ------------------------------------------------------------------------------------------- the tokenizer's template


def test_labels_of_a_tokenizers_template_are_the_chat_and_its_answers():
    """Ids are those of the chat's prompt before each answer, in whose text bos is written; labels are the answer's ids
    and the eos after it."""
    from models.tiny_llava import tiny_llava

    model = tiny_llava(template="")
    turns = ["<image>\nname three fruits", "sea, time", "which?", "blue"]
    example = training_template("", model.tokenizer).example(model.tokenizer, turns, True)
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    for index in (1, 3):
        prompt = model.chat_prompt(messages[:index])
        before = model.turn_ids(prompt, [1])
        answer = model.tokenizer.encode([turns[index]], add_special_tokens=False)[0] + [model.tokenizer.eos[0]]
        after = example.ids[len(before) :][: len(answer)]
        assert example.ids[: len(before)].tolist() == before and after.tolist() == answer
        assert example.labels[len(before) :][: len(answer)].tolist() == answer
        assert example.labels[len(before) - 1] == IGNORED
    assert (example.labels != IGNORED).sum() == len(answer) + len(model.tokenizer.encode(["sea, time"])[0]) + 1
    assert (example.ids == PLACEHOLDER).sum() == 1
    text = model.tokenizer.decode(example.ids[example.ids != PLACEHOLDER], skip_special_tokens=False)
    assert (
        text == "<s>user\n\nname three fruits</s><s>assistant\nsea, time</s><s>user\nwhich?</s><s>assistant\nblue</s>"
    )


def test_a_tokenizer_without_a_template_has_vicunas():
    bare = dataclasses.replace(chat_tokenizer(), templates={})
    assert training_template("", bare) is TEMPLATES["vicuna_v1"]
