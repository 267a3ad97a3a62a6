"""BLIP-2's second stage: sizes, prompts, captions, answers, chats, layouts. Against transformers:
test_blip2_language_hf.py; against LAVIS: the vault."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tiny_blip2
import tiny_blip2_language as tiny
from models.tiny_llava import picture
from PIL import Image

import mmjax
from mmjax import cli
from mmjax.errors import MmjaxError
from mmjax.generation.engine import generate
from mmjax.generation.options import BeamRules
from mmjax.interface.conversation import Conversation
from mmjax.models.blip2.network import Blip2Config
from mmjax.models.blip2_language.checkpoint_lavis import LAVIS
from mmjax.models.blip2_language.start import load_trained, second_stage, with_line_end
from mmjax.models.blip2_language.tasks import Blip2LanguageModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.t5.network import T5Config
from mmjax.models.vision_language.network import MlpConnector, QueryConnector, VisionLanguageConfig
from mmjax.tree import flatten, tree_hash
from mmjax.weights.files import write_safetensors
from mmjax.weights.table import save_table

PROMPTS = ["once upon", "name three fruits", "the"]
IMAGES = [picture(seed) for seed in range(3)]
KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


def test_the_published_sizes():
    """Trained parameters, in millions, of the paper's table 1: queries, Q-Former, last norm, projection."""
    decoders = [DecoderConfig.opt_2_7b(), DecoderConfig.opt_6_7b()]
    languages: list[Any] = [dataclasses.replace(each, depth=1) for each in decoders]
    languages += [T5Config.flan_t5_xl(depth=1, decoder_depth=1), T5Config.flan_t5_xxl(depth=1, decoder_depth=1)]
    for first, expected in (
        (Blip2Config.eva_g(), (107.1, 108.3, 106.7, 108.3)),
        (Blip2Config.clip_l(), (103.6, 104.8, 103.2)),
    ):
        first = dataclasses.replace(first, vision=dataclasses.replace(first.vision, depth=1))
        for language, millions in zip(languages, expected):
            flat = flatten(Blip2LanguageModel.shapes(second_stage(first, language))["params"])
            trained = [leaf.size for path, leaf in flat.items() if path.startswith(("connector/", "vision/norm/"))]
            assert round(sum(trained) / 1e6, 1) == millions, type(language)


def test_parts_that_do_not_fit():
    qformer = tiny_blip2.QFORMER
    with pytest.raises(MmjaxError, match=r"connector: the qformer needs .* mlm=False; it has 0, True, .* True$"):
        QueryConnector(qformer)
    with pytest.raises(MmjaxError, match=r"bert: vocab_size=0: without text there are .* it has 0, False, True, True"):
        dataclasses.replace(qformer, vocab_size=0)
    with pytest.raises(MmjaxError, match="decoder_depth=0 is an encoder alone"):
        second_stage(tiny.FIRST, dataclasses.replace(tiny.language("t5").config, decoder_depth=0))


# ------------------------------------------------------------------------------------------------------------- prompts


@KINDS
def test_a_prompt_of_a_batch_is_continued_as_alone(kind):
    model = tiny.model(kind)
    texts = model.generate(PROMPTS, images=IMAGES, max_new_tokens=6)
    assert texts == [model.generate(p, images=[i], max_new_tokens=6) for p, i in zip(PROMPTS, IMAGES)]
    assert texts == model.generate([f"<image>{p}" for p in PROMPTS], images=[[i] for i in IMAGES], max_new_tokens=6)
    assert texts != model.generate(PROMPTS, images=IMAGES[::-1], max_new_tokens=6)
    beams = model.generate(PROMPTS, images=IMAGES, max_new_tokens=6, num_beams=3)
    assert beams[1] == model.generate(PROMPTS[1], images=[IMAGES[1]], max_new_tokens=6, num_beams=3)
    assert "".join(model.stream(PROMPTS[0], images=IMAGES[:1], max_new_tokens=6)) == texts[0]


@KINDS
def test_ids_need_no_places_for_the_queries(kind):
    """They come first, before the beginning of the sequence; new tokens are counted without them."""
    model = tiny.model(kind)
    ids = np.asarray(model.tokenizer.encode(PROMPTS[:1]))
    pixels = model.preprocess(IMAGES[:1])
    new = np.asarray(model.generate(ids, pixel_values=pixels, max_new_tokens=5, eos=()))
    assert new.shape == (1, 5)
    longer = np.concatenate([np.full((1, 5), model.config.image_token), ids], axis=1)
    np.testing.assert_array_equal(model.generate(longer, pixel_values=pixels, max_new_tokens=5, eos=()), new)
    start = np.asarray([[model.beginning()]])
    without = model.generate(start, pixel_values=pixels, max_new_tokens=5, eos=())
    text = model.generate(images=IMAGES[:1], max_new_tokens=5, eos=())
    assert text == [model.tokenizer.decode(np.asarray(without)[0].tolist())]


@pytest.mark.parametrize(
    "prompts, images, message",
    [
        (PROMPTS, IMAGES[:2], "the prompts have 3 times <image> for 2 images"),
        ("<image> a <image>", IMAGES[:1], "2 times <image> for 1 images"),
        (np.ones((2, 3), np.int32), IMAGES, "3 images and 2 texts without places of images"),
    ],
)
def test_prompts_and_images_that_do_not_fit(prompts, images, message):
    with pytest.raises(MmjaxError, match=message):
        tiny.model("opt").generate(prompts, images=images)


# ------------------------------------------------------------------------------------------------ captions and answers


@KINDS
def test_captions_are_generated_as_lavis_scores_them(kind):
    """5 beams, repetition 1.15, length penalty 0; </s> counts in a decoder's limits, as in transformers 4.33."""
    model = tiny.model(kind)
    new = 9 if kind == "opt" else 10
    captions = model.caption(IMAGES, max_length=10, min_length=4, batch_size=2)
    assert captions == [model.caption([image], max_length=10, min_length=4)[0] for image in IMAGES]
    ids = np.asarray([model.encode_prompt("a photo of", [5])])
    for image, caption in zip(IMAGES, captions):
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": model.pixels([image])}
        arrays = model.prompt_inputs(inputs)
        del arrays["input_ids"]
        options = model.options(num_beams=5, repetition_penalty=1.15, length_penalty=0.0, max_new_tokens=new,
                                min_new_tokens=3, beam_rules=BeamRules.v4_33(), bos=model.config.bos)  # fmt: skip
        generated = generate(model.decodable(), model.variables, arrays, options).ids[0, 0]
        ended = [i for i, id in enumerate(generated.tolist()) if id in model.eos] + [len(generated)]
        assert model.tokenizer.decode(generated[: ended[0]].tolist()).strip() == caption
    sampled = model.caption(IMAGES, top_p=0.9, seed=1, max_length=10)
    assert sampled == model.caption(IMAGES, top_p=0.9, seed=1, max_length=10) != captions


@KINDS
def test_answers_are_short_and_of_one_image_each(kind):
    model = tiny.model(kind)
    questions = ["Which of them is yellow?", "the Sea!"]
    answers = model.answer(IMAGES[:2], questions)
    cleaned = ["which of them is yellow?", "the sea"]
    penalty = {"opt": 0.0, "t5": -1.0}[kind]
    assert answers == [
        model.answer([image], [text], max_new_tokens=10, length_penalty=penalty, num_beams=5)[0]
        for image, text in zip(IMAGES, cleaned)
    ]
    with pytest.raises(MmjaxError, match="2 images and 1 questions"):
        model.answer(IMAGES[:2], ["what?"])


@KINDS
def test_a_conversation_is_one_prompt(kind):
    """With its history, and the cache of earlier turns where there is one."""
    model = tiny.model(kind)
    talk = Conversation(model, max_new_tokens=4)
    first = "".join(talk.say("what is it?", IMAGES[:1]))
    prompt = "Question: what is it? Answer:"
    assert first == model.generate(prompt, images=IMAGES[:1], max_new_tokens=4)
    assert first == model.chat("what is it?", images=IMAGES[:1], max_new_tokens=4)
    second = "".join(talk.say("and why?"))
    assert model.chat_prompt(talk.messages[:-1]).text.count("<image>") == 1
    history = f"{prompt} {first.strip().rstrip('.')}. Question: and why? Answer:"
    assert second == model.generate(history, images=IMAGES[:1], max_new_tokens=4)


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mmjax.hub.save(tiny.model("opt"), tmp_path / "m")
    for i, image in enumerate(IMAGES[:2]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    assert cli.main(["caption", "m", "0.png", "1.png", "--num_beams", "1"]) == 0
    assert cli.main(["answer", "m", "0.png", "--question", "what?"]) == 0
    (tmp_path / "captions.json").write_text(
        '[{"image": "0.png", "caption": ["a red hen", "a boat"]}, {"image": "1.png", "caption": ["two cat"]}]'
    )
    assert cli.main(["evaluate", "m", "--task", "captions", "--data", "captions.json", "--images", "."]) == 0
    answers = ["yes"] * 10
    entries = [
        {"image": f"{i}.png", "dataset": "vqa", "question": "is it?", "question_id": i, "answer": answers}
        for i in range(2)
    ]
    (tmp_path / "vqa.json").write_text(json.dumps(entries))
    assert cli.main(["evaluate", "m", "--task", "vqa", "--data", "vqa.json", "--images", "."]) == 0
    printed = capsys.readouterr().out
    assert "cider" in printed and "system blip2_language" in printed
    stored = json.loads((tmp_path / "evaluations" / "vqa_predictions.json").read_text())
    expected = tiny.model("opt").answer(IMAGES[:2], ["is it?"] * 2)
    assert [one["answer"] for one in stored] == expected
    flags = ["evaluate", "m", "--task", "vqa", "--data", "vqa.json", "--images", ".", "--answers", "list.json"]
    (tmp_path / "list.json").write_text('["yes", "no"]')
    assert cli.main(flags) != 0
    assert "ranks no list of answers" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- its layouts


def write_lavis(folder: pathlib.Path, model: Blip2LanguageModel, left_out: tuple[str, ...] = ()) -> pathlib.Path:
    """model.safetensors in LAVIS' layout with its wrapper, and config.json with the heads."""
    arrays = save_table(LAVIS.table(model.config), {"params": jax.tree.map(np.asarray, model.params)})
    folder.mkdir(exist_ok=True)
    stored = {f"model/{key}": array for key, array in arrays.items() if not key.startswith(left_out or "-")}
    write_safetensors(folder / "model.safetensors", stored)
    (folder / "config.json").write_text(json.dumps({"vision_heads": 3, "text_heads": 2}))
    return folder / "model.safetensors"


@KINDS
def test_lavis_files_over_a_language_model(kind, tmp_path):
    """They have the trained parameters alone; the image encoder lies beside them."""
    model, prefix = tiny.model(kind), f"{kind}_model."
    file = write_lavis(tmp_path, model, (prefix, "visual_encoder."))
    with pytest.raises(MmjaxError, match=rf"it has no {prefix}\*: .*start.load_trained\(FILE, language\)"):
        mmjax.load(file)
    language = tiny.language(kind).replace(params=model.params["language"])
    with pytest.raises(MmjaxError, match=r"it has no visual_encoder\.\*: .* under the name eva_vit_g.pth or clip"):
        load_trained(file, language)
    arrays = save_table(LAVIS.table(model.config), {"params": jax.tree.map(np.asarray, model.params)})
    start = "visual_encoder."
    tower = {key.removeprefix(start): np.asarray(x) for key, x in arrays.items() if key.startswith(start)}
    torch = pytest.importorskip("torch")
    torch.save({key: torch.tensor(x) for key, x in tower.items()}, tmp_path / "eva_vit_g.pth")
    loaded = load_trained(file, language)
    assert tree_hash(loaded.params) == tree_hash(model.params) and loaded.eos == model.eos
    assert loaded.config == dataclasses.replace(model.config, connector=loaded.config.connector)
    pixels, ids = model.preprocess(IMAGES[:1]), np.asarray([[3, 9, 8]])
    others = {"decoder_input_ids": ids} if kind == "t5" else {}
    for each in (loaded, model):
        logits = each.forward(pixels, ids, **others)["logits"]
    np.testing.assert_allclose(loaded.forward(pixels, ids, **others)["logits"], logits, atol=1e-6)
    other = tiny.language("t5" if kind == "opt" else "opt")
    with pytest.raises(MmjaxError, match=f"its projection is to {kind}; this language model is"):
        load_trained(file, other)


def test_a_whole_lavis_file_needs_the_config_of_its_language_model(tmp_path):
    model = tiny.model("t5")
    file = write_lavis(tmp_path, model)
    with pytest.raises(MmjaxError, match=r"its t5_model.\* is in no array: put a config.json with text_config beside"):
        mmjax.load(file)
    losses = mmjax.export(model, tmp_path / "out", layout="lavis")
    assert any("text_config" in loss for loss in losses)
    assert tree_hash(mmjax.load(tmp_path / "out").params) == tree_hash(model.params)


def test_other_connectors_and_encoders_have_no_layout(tmp_path):
    model = tiny.model("opt")
    other = model.replace(config=dataclasses.replace(model.config, connector=MlpConnector()))
    with pytest.raises(MmjaxError, match="BLIP-2's layouts have a Q-Former for a connector, not MlpConnector"):
        mmjax.export(other, tmp_path, layout="hf")


@KINDS
def test_a_saved_model_is_the_same(kind, tmp_path):
    model = tiny.model(kind)
    mmjax.hub.save(model, tmp_path)
    again = mmjax.load(tmp_path)
    assert again.config == model.config and isinstance(again.config, VisionLanguageConfig)
    assert again.tokenizer.eos == model.tokenizer.eos and again.preprocess == model.preprocess
    assert tree_hash(again.params) == tree_hash(model.params)
    assert {"caption", "answer", "chat", "generate"} <= set(again.abilities)
    small = mmjax.load(tmp_path, weights="int8")
    ids = np.asarray([[3, 9, 8]])
    others = {"decoder_input_ids": ids} if kind == "t5" else {}
    exact, rounded = (np.asarray(each.forward(model.preprocess(IMAGES[:1]), ids, **others)["logits"])
                      for each in (model, small))  # fmt: skip
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


def test_texts_end_with_a_line_break():
    language = tiny.language("opt")
    config, tokenizer = with_line_end(language.config, language.tokenizer)
    assert tokenizer.decode(config.eos) == "\n" and tokenizer.eos == config.eos
    assert with_line_end(tiny.language("t5").config, language.tokenizer)[0] == tiny.language("t5").config
