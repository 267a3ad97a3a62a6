"""BlipModel: the original's files both ways, captions, answers, matching and retrieval, and every refusal."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_blip as tiny

import mmjax
from mmjax import cli, tree
from mmjax.errors import MmjaxError
from mmjax.models.blip.checkpoint_original import table
from mmjax.models.blip.network import BlipConfig
from mmjax.models.blip.tasks import BlipModel
from mmjax.text.wordpiece import WordPieceTokenizer, wordpiece
from mmjax.weights.files import read_weights
from mmjax.weights.table import save_table

FORMS = {
    "pretraining": tiny.PRETRAINING,
    "retrieval": tiny.RETRIEVAL,
    "itm": tiny.ITM,
    "captioner": tiny.CAPTIONER,
    "vqa": tiny.VQA,
    "nlvr": tiny.NLVR,
}
SIZES = {"vision_heads": 2, "text_heads": 2}


def stateful(form: str) -> BlipModel:
    """A model of every form, with momentum encoders and queues where the original has them."""
    config = dataclasses.replace(FORMS[form], holds_state=form in ("pretraining", "retrieval"))
    rng = np.random.default_rng(0)

    def sample(leaf: Any) -> Any:
        return jnp.asarray(rng.normal(size=leaf.shape) * 3, leaf.dtype)

    variables = jax.tree.map(sample, BlipModel.shapes(config))
    preprocess = BlipModel.default_preprocess(config, "blip")
    return BlipModel(config, tokenizer=tiny.TOKENIZER, preprocess=preprocess, layout="blip", **variables)


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (9, 11, 3)).astype(np.uint8) for _ in range(count)]


def model(form: str) -> BlipModel:
    config = FORMS[form]
    return tiny.model(config, preprocess=BlipModel.default_preprocess(config, "blip"))


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_with_the_same_bits(form: str, tmp_path: pathlib.Path):
    model = stateful(form)
    mmjax.export(model, tmp_path / "public", layout="blip")
    mmjax.save(model, tmp_path / "own")
    for folder in ("public", "own"):
        loaded = mmjax.load(tmp_path / folder)
        assert isinstance(loaded, BlipModel) and loaded.config == model.config and loaded.layout == "blip"
        for collection in ("params", "stats"):
            actual, expected = (tree.flatten(getattr(m, collection)) for m in (loaded, model))
            assert actual.keys() == expected.keys()
            for path, leaf in expected.items():
                np.testing.assert_array_equal(actual[path], leaf, err_msg=path)
        assert loaded.preprocess == model.preprocess
        assert loaded.tokenizer.pieces("a red hen") == tiny.TOKENIZER.pieces("a red hen")
        assert [loaded.tokenizer.tokenizer.token_to_id(name) for name in ("[DEC]", "[ENC]")] == [tiny.DEC, tiny.ENC]


def test_what_is_shared_stands_under_every_name(tmp_path: pathlib.Path):
    """The original loads pre-training files with every key of encoder and decoder; the embeddings have three names."""
    mmjax.export(stateful("pretraining"), tmp_path, layout="blip")
    arrays = read_weights(tmp_path / "model.safetensors").arrays
    shared = [key for key in arrays if key.startswith("text_encoder.") and "/attention" not in key]
    pairs = [(key, key.replace("text_encoder.", "text_decoder.bert.", 1)) for key in shared]
    same = {key for key, other in pairs if np.array_equal(arrays[key], arrays[other])}
    assert {key for key in shared if ".attention." not in key} == same
    words = ("text_encoder.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight")
    np.testing.assert_array_equal(*(arrays[key] for key in words))


@pytest.mark.torch
@pytest.mark.parametrize("form", FORMS)
def test_files_of_the_original_scripts(form: str, tmp_path: pathlib.Path):
    """A .pth with an optimizer's state and buffers; without a config.json heads are assumed, and that is noted."""
    torch = pytest.importorskip("torch")
    expected = stateful(form)
    variables = {"params": expected.params} | ({"stats": expected.stats} if expected.stats else {})
    arrays = dict(save_table(table(expected.config), jax.tree.map(np.asarray, variables)))
    for name in ("text_encoder", "text_decoder.bert"):
        if f"{name}.embeddings.word_embeddings.weight" in arrays:
            arrays[f"{name}.embeddings.position_ids"] = np.arange(40)[None]
    contents = {"model": {key: torch.tensor(x) for key, x in arrays.items()}, "optimizer": {}, "epoch": 3}
    torch.save(contents, tmp_path / "model_base.pth")
    (tmp_path / "vocab.txt").write_text("\n".join(tiny.VOCABULARY))
    (tmp_path / "config.json").write_text('{"vision_heads": 2, "text_heads": 2}')
    loaded = mmjax.load(tmp_path / "model_base.pth")
    sizes = {"sep": None, "temperature": loaded.config.temperature, "momentum": 0.995}
    assert loaded.notes == () and loaded.eos == (tiny.SEP,)
    for name in ("text", "decoder", "shared", "embed_dim", "matching", "classes", "queue", "by_image", "holds_state"):
        assert getattr(loaded.config, name) == getattr(expected.config, name), name
    assert loaded.config == dataclasses.replace(expected.config, vision=loaded.config.vision, **sizes)
    assert loaded.config.vision.drop_path == (0.1 if form in ("vqa", "nlvr") else 0.0)
    assert tree.tree_hash(loaded.params) == tree.tree_hash(expected.params)
    (tmp_path / "config.json").unlink()
    with pytest.raises(MmjaxError, match="the number of heads of a ViT 24 wide is in no array"):
        mmjax.load(tmp_path / "model_base.pth")


def test_the_command_line_converts(tmp_path: pathlib.Path, capsys):
    mmjax.export(stateful("retrieval"), tmp_path / "original", layout="blip")
    arguments = ["convert", str(tmp_path / "original"), str(tmp_path / "hf"), "--layout", "hf"]
    assert cli.main(arguments) != 0
    assert "cannot hold params/temperature; stats/momentum; stats/queue" in capsys.readouterr().err
    assert cli.main([*arguments, "--lossy"]) == 0
    assert mmjax.load(tmp_path / "hf").config.matching


# ------------------------------------------------------------------------------------------------------------ abilities


@pytest.mark.parametrize(
    ("form", "abilities"),
    [
        ("pretraining", "match retrieve ground caption generate encode_image encode_text"),
        ("itm", "match retrieve ground encode_image encode_text"),
        ("captioner", "caption generate"),
        ("vqa", "answer generate"),
        ("nlvr", "classify_pairs"),
    ],
)
def test_what_each_form_can_do(form: str, abilities: str):
    blip = model(form)
    assert set(blip.abilities) == set(abilities.split())
    lines = repr(blip).splitlines()
    assert lines[0].startswith("BlipModel, read from the layout") and abilities.split()[0] in lines[-1]


# ------------------------------------------------------------------------------------------------------------- captions


def test_limits_of_captions_count_the_prompt():
    """max_length=20 and min_length=5 with the four ids of "a picture of": 16 new tokens at most, one at least."""
    blip, pictures = model("captioner"), images(2)
    ids = blip.generate(
        np.array([[tiny.DEC, *tiny.TOKENIZER.pieces("a picture of")[0]]] * 2), images=pictures, max_new_tokens=16,
        min_new_tokens=1, num_beams=3, beam_rules=mmjax.models.blip.tasks.BeamRules.v4_15(),
    )  # fmt: skip
    assert blip.caption(pictures) == [tiny.TOKENIZER.decode(row) for row in np.asarray(ids)]
    longest = blip.caption(pictures, max_length=5, min_length=5, num_beams=1)
    assert all(len(text.split()) == 1 for text in longest)
    bare = blip.generate(pixel_values=blip.pixels(pictures), max_new_tokens=6)
    assert blip.caption(pictures, prompt=None, num_beams=1, max_length=7, min_length=0) == bare


def test_a_caption_does_not_depend_on_its_batch():
    blip, pictures = model("captioner"), images(5)
    together = blip.caption(pictures)
    assert together == blip.caption(pictures, batch_size=2)
    assert together == [blip.caption([picture])[0] for picture in pictures]
    assert len(set(together)) > 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_ragged_prompts_are_continued_as_single_ones(options: dict[str, Any]):
    """Strings padded on the left; ids padded on either side."""
    blip, pictures = model("captioner"), images(3)
    prompts = ["a picture of", "the red boat in the", "two"]
    together = blip.generate(prompts, images=pictures, max_new_tokens=8, **options)
    assert together == [
        blip.generate([prompt], images=[picture], max_new_tokens=8, **options)[0]
        for prompt, picture in zip(prompts, pictures)
    ]
    rows = [[tiny.DEC, *ids] for ids in tiny.TOKENIZER.pieces(prompts)]
    for side in ("left", "right"):
        width = max(map(len, rows))
        pads = [(0, width - len(row)) if side == "right" else (width - len(row), 0) for row in rows]
        ids = np.stack([np.pad(row, pad) for row, pad in zip(rows, pads)])
        mask = np.stack([np.pad(np.ones(len(row), int), pad) for row, pad in zip(rows, pads)])
        new = blip.generate(ids, images=pictures, attention_mask=mask, max_new_tokens=8, **options)
        assert [tiny.TOKENIZER.decode(row) for row in np.asarray(new)] == together, side


def test_nucleus_samples_differ_by_seed_and_end_as_the_original_says():
    blip, pictures = model("captioner"), images(3)
    samples = [blip.caption(pictures, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    several = blip.caption(pictures, top_p=0.9, seed=1, num_return_sequences=4)
    assert [len(texts) for texts in several] == [4, 4, 4] and len(set(several[0])) > 1
    # A nucleus of nearly nothing is the greedy text under the same penalty.
    greedy = blip.caption(pictures, num_beams=1, repetition_penalty=1.1)
    assert blip.caption(pictures, top_p=1e-6) == greedy


def test_a_pretrained_model_writes_captions():
    """Its decoder is stored in part, and runs on the encoder's other parameters."""
    blip, pictures = model("pretraining"), images(2)
    ids = np.full((2, 1), tiny.DEC, np.int32)
    new = np.asarray(blip.generate(ids, images=pictures, max_new_tokens=4))
    inputs = {"pixel_values": blip.pixels(pictures), "decoder_input_ids": np.concatenate([ids, new[:, :-1]], axis=1)}
    texts = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits = blip.forward(**inputs, **texts)["logits"]
    written = np.cumsum(np.cumsum(new == tiny.SEP, axis=1), axis=1) <= 1
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[written], new[written])


# -------------------------------------------------------------------------------------------------------------- answers


def test_written_answers_do_not_depend_on_the_other_questions():
    """Strings, of `answer` and of `generate`: a question among others is answered as alone, as ids without padding."""
    blip, pictures = model("vqa"), images(3)
    questions = ["What color is the hen?", "how many", "is the red boat in the sea or on a mat?"]
    answers = blip.answer(pictures, questions)
    assert answers == [blip.answer([p], [q])[0] for p, q in zip(pictures, questions)]
    options: dict[str, Any] = {"max_new_tokens": 9, "num_beams": 3}
    options["beam_rules"] = mmjax.models.blip.tasks.BeamRules.v4_15()
    assert blip.generate(questions, images=pictures, **options) == answers
    ids = np.array([[tiny.ENC, *tiny.TOKENIZER.pieces(questions[0])[0], tiny.SEP]])
    new = np.asarray(blip.generate(ids, images=pictures[:1], **options))[0]
    assert tiny.TOKENIZER.decode(new) == answers[0]
    assert len(set(answers)) > 1


def test_ranked_answers_are_scored_with_label_smoothing():
    """By hand: 0.9 times the negative log-likelihood and 0.1 times the mean over the vocabulary, summed over tokens."""
    blip, picture = model("vqa"), images(1)
    choices = ["yes", "no", "red", "two", "the red boat"]
    ids, mask = blip.columns(["what color"], question=True)
    columns = blip.answer_columns(choices)
    assert (columns[0][:, 0] == tiny.DEC).all()
    ranking = blip.rank(blip.pixels(picture), ids, mask, *columns)
    enc = np.asarray(ids).copy()
    enc[:, 0] = tiny.ENC
    losses = []
    for row, row_mask in zip(*columns):
        out = blip.forward(
            blip.pixels(picture), enc, mask, decoder_input_ids=row[None], decoder_attention_mask=row_mask[None]
        )
        log_probs = np.asarray(jax.nn.log_softmax(out["logits"][0]))
        length = row_mask.sum()
        targets = row[1:length]
        nll = -log_probs[np.arange(length - 1), targets]
        losses.append((0.9 * nll - 0.1 * log_probs[: length - 1].mean(axis=1)).sum())
    assert ranking.indices[0].tolist() == np.argsort(losses).tolist()
    expected = np.exp(-np.sort(losses)) / np.exp(-np.array(losses)).sum()
    np.testing.assert_allclose(ranking.probabilities[0], expected, rtol=1e-4)
    best = blip.answer(picture, ["what color"], choices, top=5)[0]
    assert [name for name, _ in best] == [choices[i] for i in np.argsort(losses)]


# ----------------------------------------------------------------------------------------------- matching and retrieval


def test_pairs_are_matched_with_enc_first():
    """`match` is the head's probability on [ENC]; `forward` takes ids as they are, and so [CLS] gives another."""
    blip, pictures = model("itm"), images(2)
    texts = ["A red hen!", "the boat in the sea"]
    ids, mask = blip.columns(["a red hen", "the boat in the sea"])
    assert ids[0, :5].tolist() == [tiny.CLS, *tiny.TOKENIZER.pieces("a red hen")[0], tiny.SEP]
    scores = {}
    for first in (tiny.ENC, tiny.CLS):
        ids = np.asarray(ids).copy()
        ids[:, 0] = first
        scores[first] = jax.nn.softmax(blip.forward(blip.pixels(pictures), ids, mask)["itm_score"])[:, 1]
    np.testing.assert_allclose(blip.match(pictures, texts), scores[tiny.ENC], rtol=1e-5)
    assert np.abs(scores[tiny.ENC] - scores[tiny.CLS]).max() > 1e-3


def test_reranking_adds_the_cosine_to_the_logit():
    blip, pictures = model("itm"), images(4)
    texts = ["a red hen", "the boat in the sea", "two cat on a mat"]
    cosines = np.asarray(blip.encode_image(pictures) @ blip.encode_text(texts).T)
    ids, mask = (np.asarray(x) for x in blip.columns(texts, 35))
    enc = ids.copy()
    enc[:, 0] = tiny.ENC
    pixels, logits = blip.pixels(pictures), []
    for row, row_mask in zip(enc, mask):
        columns = (np.tile(x, (4, 1)) for x in (row, row_mask))
        logits.append(np.asarray(blip.forward(pixels, *columns)["itm_score"][:, 1]))
    found = blip.retrieve(texts, pictures, k=4, rerank=4)
    for i, row in enumerate(found):
        expected = logits[i] + cosines[:, i]
        np.testing.assert_allclose([score for _, score in row], np.sort(expected)[::-1], atol=1e-5)
        assert [j for j, _ in row] == np.argsort(-expected).tolist()
    alone = blip.retrieve(texts, pictures, k=4, rerank=4, add_similarity=False)
    np.testing.assert_allclose([s for _, s in alone[0]], np.sort(logits[0])[::-1], atol=1e-5)


def test_videos_are_retrieved_by_the_mean_of_their_frames():
    """Features: the mean of the frames' projections before they are normalised. Scores: all frames' tokens at once."""
    blip, texts = model("itm"), ["a red hen", "the boat in the sea"]
    clips = [images(19, seed=seed) for seed in range(3)]
    videos = np.stack([blip.frames(clip) for clip in clips])
    picked = blip.pixels([clips[0][i] for i in (0, 2, 4, 6, 8, 10, 12, 14)])  # floor(19 / 8) = 2
    np.testing.assert_array_equal(videos[0], picked)
    head = {name: np.asarray(leaf) for name, leaf in blip.params["vision_proj"].items()}
    tokens = np.asarray(blip.forward(picked)["last_hidden_state"])
    mean = (tokens[:, 0] @ head["kernel"] + head["bias"]).mean(axis=0)
    features = np.asarray(blip.encode_image(videos))
    np.testing.assert_allclose(features[0], mean / np.linalg.norm(mean), atol=1e-5)

    ids, mask = (np.asarray(x) for x in blip.columns(texts, 35))
    states = blip.module.apply(
        blip.variables, ids[:1], mask[:1], None, tokens.reshape(1, -1, tokens.shape[-1]), method="encode_pair"
    )
    logit = blip.module.apply(blip.variables, states, method="itm_logits")[0, 1]
    scores = dict(blip.retrieve(texts, videos, k=3, rerank=3)[0])
    cosine = features[0] @ np.asarray(blip.encode_text(texts))[0]
    assert scores[0] == pytest.approx(float(logit + cosine), abs=1e-4)
    with pytest.raises(MmjaxError, match="a video of 5 frames: 8 are taken"):
        blip.frames(clips[0][:5])


def test_where_a_text_is_in_its_image():
    """Grad-CAM over the words, in the first of two layers: each patch has a weight, and other texts have others."""
    blip, pictures = model("itm"), images(2)
    maps, logits = blip.heat_maps(pictures, ["a red hen", "the boat"])
    assert maps.shape == (2, 2, 2) and logits.shape == (2, 2) and (np.asarray(maps) >= 0).all()
    other, _ = blip.heat_maps(pictures, ["two cat on a mat", "the boat"])
    assert np.abs(other[0] - maps[0]).max() > 1e-4 * np.abs(maps[0]).max()
    np.testing.assert_allclose(other[1], maps[1], rtol=1e-3, atol=1e-7)


def test_texts_of_two_images_are_classified():
    blip, first, second = model("nlvr"), images(2), images(2, seed=1)
    texts = ["the left image", "two boat in the right image"]
    ids, mask = blip.columns(texts)
    enc = np.asarray(ids).copy()
    enc[:, 0] = tiny.ENC
    pixels = np.concatenate([blip.pixels(first), blip.pixels(second)])
    probabilities = jax.nn.softmax(blip.forward(pixels, enc, mask)["logits"])
    for row, expected in zip(blip.classify_pairs(first, texts, second), np.asarray(probabilities)):
        assert {name for name, _ in row} == {"False", "True"}
        np.testing.assert_allclose(dict(row)["True"], expected[1], rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- errors


def test_what_a_model_cannot_do_is_refused():
    pictures = images(2)
    captioner, vqa, itm, nlvr = (model(form) for form in ("captioner", "vqa", "itm", "nlvr"))
    with pytest.raises(MmjaxError, match="no decoder of captions"):
        vqa.caption(pictures)
    with pytest.raises(MmjaxError, match="no decoder: pre-trained ones, captioners"):
        itm.generate(["a"], images=pictures[:1])
    with pytest.raises(MmjaxError, match="no decoder of answers"):
        captioner.answer(pictures, ["a", "b"])
    with pytest.raises(MmjaxError, match="no projections"):
        captioner.encode_image(pictures)
    with pytest.raises(MmjaxError, match="no ITM head"):
        nlvr.match(pictures, ["a", "b"])
    with pytest.raises(MmjaxError, match="generate needs prompts"):
        vqa.generate(images=pictures)
    with pytest.raises(MmjaxError, match="generate needs images"):
        vqa.generate(["what color"])
    with pytest.raises(MmjaxError, match="2 images and 1 texts"):
        vqa.generate(["what color"], images=pictures)
    with pytest.raises(MmjaxError, match="2 images and 3 texts"):
        itm.forward(itm.pixels(pictures), np.ones((3, 4), np.int32))
    with pytest.raises(MmjaxError, match="3 images: of pairs"):
        nlvr.forward(nlvr.pixels(images(3)), np.ones((1, 4), np.int32))


def test_faulty_options_are_refused():
    blip, pictures = model("captioner"), images(1)
    with pytest.raises(MmjaxError, match="max_length=4 counts \\[DEC\\] and the prompt: 'a picture of' has 4 ids"):
        blip.caption(pictures, max_length=4)
    with pytest.raises(MmjaxError, match="41 are more than positions=40"):
        blip.caption(pictures, max_length=41)
    with pytest.raises(MmjaxError, match="generate has no option beams"):
        blip.caption(pictures, beams=2)
    with pytest.raises(MmjaxError, match="stop: texts of blip end at"):
        blip.generate(images=pictures, stop="hen", max_new_tokens=4)
    with pytest.raises(MmjaxError, match="add_special_tokens=False leaves out"):
        blip.generate([""], images=pictures, add_special_tokens=False)


def test_a_tokenizer_of_other_ids_is_refused():
    """[DEC] where the model has another id: a vocabulary that is too short."""
    words = {word: i for i, word in enumerate(tiny.VOCABULARY[:-3])}
    tokenizer = WordPieceTokenizer(wordpiece(words, lower=True)).with_appended(("[DEC]", "[ENC]"))
    message = r"does not fit this blip: its \[DEC\] is 48, the model's 51; its \[ENC\] is 49, the model's 52"
    with pytest.raises(MmjaxError, match=message):
        model("captioner").replace(tokenizer=tokenizer).caption(images(1))
    with pytest.raises(MmjaxError, match=r"came without tokenizer\.json or vocab\.txt"):
        model("captioner").replace(tokenizer=None).caption(images(1))
    blip = model("captioner")
    with pytest.raises(MmjaxError, match=r"its \[SEP\] is 3, the model's 4"):
        blip.replace(config=dataclasses.replace(blip.config, sep=4)).caption(images(1))


def test_bfloat16_gives_nearly_the_same():
    blip = model("itm")
    config = dataclasses.replace(blip.config, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), blip.params)
    half, pictures = blip.replace(config=config, params=params), images(2)
    features = [np.asarray(m.encode_image(pictures), np.float32) for m in (blip, half)]
    assert (features[0] * features[1]).sum(axis=1).min() > 0.99
    assert isinstance(config, BlipConfig)
