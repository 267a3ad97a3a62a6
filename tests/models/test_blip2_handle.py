"""Blip2Model: matching, retrieval, grounding, captions, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_blip
import tiny_blip2 as tiny

from mmjax import cli, hub
from mmjax.errors import MmjaxError
from mmjax.generation.options import BeamRules
from mmjax.models.blip2.network import Blip2, Blip2Config
from mmjax.models.blip2.qformer import qformer
from mmjax.models.blip2.tasks import Blip2Model
from mmjax.nn.masks import grounded_mask, padding_mask
from mmjax.text.captions import caption_columns
from mmjax.text.wordpiece import WordPieceTokenizer, wordpiece
from mmjax.tree import count, flatten, split

TEXTS = ["A red hen!", "the boat in the sea", "two cat on a mat"]


@pytest.fixture(scope="module")
def blip2() -> Blip2Model:
    return tiny.model(tiny.PRETRAINING)


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(0, 256, (2, 2, 3)), np.ones((4, 4, 1))).astype(np.uint8) for _ in range(count)]


def test_the_published_sizes():
    """Trained parameters: LAVIS' Q-Former with its embeddings and LM head, queries, heads and ln_vision; 188 M in the
    paper's table, 186.7 M and 183.2 M by the shapes of its files. EVA's encoder: 985.9 M and its last norm."""
    for config, trained, tower in ((Blip2Config.eva_g(), 186.7, 985.9), (Blip2Config.clip_l(), 183.2, 290.6)):
        sizes = []
        for depth in (1, 2):  # blocks are equal, and tracing all of them takes long
            short = dataclasses.replace(config, vision=dataclasses.replace(config.vision, depth=depth))
            params = Blip2Model.shapes(short)["params"]
            frozen = [p for p in flatten(params) if p.startswith("vision/") and "vision/norm/" not in p]
            sizes.append([count(part) for part in split(params, frozen)])
        (first, rest), (second, again) = sizes
        encoder = first + (config.vision.depth - 1) * (second - first)
        assert rest == again and (round(rest / 1e6, 1), round(encoder / 1e6, 1)) == (trained, tower)


def test_a_generated_text_sees_the_queries_and_what_comes_before_it(blip2):
    """The cached pass is that of queries and text together under UniLM's mask; and the text never sees the image."""
    inputs, q = tiny_blip.inputs(), tiny.PRETRAINING.queries
    ids = np.where(inputs["ids"] >= tiny.VOCAB, 7, inputs["ids"])
    mask = inputs["mask"]

    def whole(network: Blip2, images: Any, ids: Any, mask: Any) -> Any:
        x = network.qformer.embed(ids, queries=network._queries(len(ids)))
        visible = grounded_mask(q, ids.shape[1]) & padding_mask(network._with_queries(mask))
        states = network.qformer.run(x, visible, network.encode_image(images), queries=q)[-1][:, q:]
        return network.qformer.mlm_logits(states)

    module = blip2.config.network()
    expected = jax.jit(lambda v: module.apply(v, inputs["images"], ids, mask, method=whole))(blip2.variables)
    columns = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    actual = blip2.forward(inputs["images"], **columns)["logits"]
    at = mask == 1
    np.testing.assert_allclose(np.asarray(actual)[at], np.asarray(expected)[at], atol=2e-5 * np.abs(expected).max())


# ----------------------------------------------------------------------------------------------- matching and retrieval


def test_matching_is_the_mean_of_the_queries_and_similarity_the_nearest(blip2):
    pictures = images(3)
    ids, mask = blip2.columns(TEXTS)
    assert ids[0, :5].tolist() == [tiny_blip.CLS, *tiny.TOKENIZER.pieces("a red hen")[0], tiny.SEP]
    outputs = blip2.forward(blip2.pixels(pictures), ids, mask)
    np.testing.assert_allclose(blip2.match(pictures, TEXTS), jax.nn.softmax(outputs["itm_logits"])[:, 1], rtol=1e-5)
    head = blip2.params["itm_head"]
    by_query = np.asarray(outputs["multimodal_embeds"]) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(outputs["itm_logits"], by_query.mean(axis=1), atol=1e-5)
    of_images, of_texts = np.asarray(blip2.encode_image(pictures)), np.asarray(blip2.encode_text(TEXTS))
    assert of_images.shape == (3, 5, 7) and of_texts.shape == (3, 7)
    nearest = np.einsum("nqe,me->nqm", of_images, of_texts).max(axis=1)
    np.testing.assert_allclose(outputs["logits_per_image"], nearest, atol=1e-5)
    np.testing.assert_allclose(blip2.similarity(of_texts, of_images), nearest.T, atol=1e-5)
    for i, row in enumerate(blip2.retrieve(TEXTS, of_images, k=3)):
        assert [j for j, _ in row] == np.argsort(-nearest[:, i]).tolist()
        np.testing.assert_allclose([score for _, score in row], np.sort(nearest[:, i])[::-1], atol=1e-5)
    itself = [row[0] for row in blip2.retrieve(pictures, pictures, k=1)]
    assert [i for i, _ in itself] == [0, 1, 2]
    np.testing.assert_allclose([score for _, score in itself], 1, atol=1e-5)


def test_reranking_adds_the_cosine_of_the_nearest_query_to_the_logit(blip2):
    pictures = images(4)
    ids, mask = (np.asarray(x) for x in blip2.columns(TEXTS, 35))
    pixels = blip2.pixels(pictures)
    for add in (None, False):
        ranked = blip2.retrieve(TEXTS, pictures, k=4, rerank=4, add_similarity=add)
        for row, row_ids, row_mask in zip(ranked, ids, mask):
            outputs = blip2.forward(pixels, *(np.tile(x, (4, 1)) for x in (row_ids, row_mask)))
            expected = np.asarray(outputs["itm_logits"][:, 1])
            expected = expected + np.asarray(outputs["logits_per_image"][:, 0]) * (add is None)
            assert [j for j, _ in row] == np.argsort(-expected).tolist()
            np.testing.assert_allclose([score for _, score in row], np.sort(expected)[::-1], atol=1e-5)


def test_where_a_text_is_in_its_image(blip2):
    """Grad-CAM over the queries, in the last layer with cross attention: 2 of 0 to 2."""
    pictures = images(2)
    maps, logits = blip2.heat_maps(pictures, TEXTS[:2])
    assert maps.shape == (2, 2, 2) and logits.shape == (2, 2) and (np.asarray(maps) >= 0).all()
    np.testing.assert_array_equal(maps, blip2.heat_maps(pictures, TEXTS[:2], block=2)[0])
    other, _ = blip2.heat_maps(pictures, [TEXTS[2], TEXTS[1]])
    assert np.abs(other[0] - maps[0]).max() > 1e-3 * np.abs(maps[0]).max()
    np.testing.assert_allclose(other[1], maps[1], rtol=1e-3, atol=1e-7)
    grounding = blip2.ground(pictures[0], TEXTS[0])
    assert grounding.heat.shape == (8, 8)
    assert grounding.probability == pytest.approx(float(jax.nn.softmax(logits)[0, 1]), rel=1e-4)
    with pytest.raises(MmjaxError, match="block=1: the layers with cross attention are 0, 2"):
        blip2.ground(pictures[0], TEXTS[0], block=1)


# ------------------------------------------------------------------------------------------------------------- captions


def test_captions_are_generated_batch_by_batch(blip2):
    pictures = images(3)
    together = blip2.caption(pictures, max_length=12, min_length=4)
    options: dict[str, Any] = {"num_beams": 3, "beam_rules": BeamRules.v4_33()}
    ids = blip2.generate(np.full((3, 1), tiny.DEC), images=pictures, max_new_tokens=11, min_new_tokens=3, **options)
    assert together == [tiny.TOKENIZER.decode(row) for row in np.asarray(ids)]
    assert together == blip2.caption([*pictures, *pictures], max_length=12, min_length=4, batch_size=3)[3:]
    assert len(set(together)) > 1
    samples = [blip2.caption(pictures, "a picture of", top_p=0.9, seed=s, max_length=12) for s in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_are_the_whole_pass(blip2, side: str):
    """Greedy ids after padded prompts are the argmax of the logits of prompt and ids without padding."""
    pixels = blip2.pixels(images(2))
    prompts = [[tiny.DEC, 7, 9, 8], [tiny.DEC, 11]]
    pads = [(0, 4 - len(row)) if side == "right" else (4 - len(row), 0) for row in prompts]
    ids, mask = (np.stack([np.pad(row, pad) for row, pad in zip(rows, pads)]) for rows in (prompts, [[1] * 4, [1] * 2]))
    new = np.asarray(blip2.generate(ids, pixel_values=pixels, attention_mask=mask, max_new_tokens=5))
    for i, (prompt, row) in enumerate(zip(prompts, new)):
        text = np.array([[*prompt, *row]])
        logits = np.asarray(blip2.forward(pixels[i : i + 1], decoder_input_ids=text)["logits"])[0]
        length = len(row) if tiny.SEP not in row else row.tolist().index(tiny.SEP) + 1
        first = len(prompt) - 1
        np.testing.assert_array_equal(logits[first : first + length].argmax(-1), row[:length])


# ----------------------------------------------------------------------------------------------------------- the shell


def test_the_verbs_work(blip2, tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.setattr(hub, "load", lambda source, **_: blip2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images(3)):
        Image.fromarray(image).save(f"folder/{i}.png")
    cosine = float(blip2.similarity(blip2.encode_image(images(1)), blip2.encode_text(TEXTS[:1]))[0, 0])
    assert cli.main(["match", "m", "folder/0.png", "--text", TEXTS[0]]) == 0
    assert f"{cosine:.3f}" in capsys.readouterr().out
    assert cli.main(["retrieve", "m", "--text", TEXTS[0], "--folder", "folder", "-k", "3"]) == 0
    assert f"{cosine:.3f}" in capsys.readouterr().out
    assert cli.main(["retrieve", "m", "--text", TEXTS[0], "--folder", "folder", "-k", "2", "--rerank", "3"]) == 0
    assert "ITM logit + cosine" in capsys.readouterr().out
    assert cli.main(["ground", "m", "folder/0.png", "--text", TEXTS[0]]) == 0
    assert "match" in capsys.readouterr().out and (tmp_path / "heat.png").is_file()
    assert cli.main(["caption", "m", "folder/0.png"]) == 0
    (tmp_path / "list.json").write_text(
        '[{"image": "0.png", "caption": ["a red hen", "a boat"]}, {"image": "1.png", "caption": ["two cat"]}]'
    )
    for k in ("2", "0"):
        capsys.readouterr()
        flags = ["evaluate", "m", "--task", "retrieval", "--data", "list.json", "--images", "folder", "--k", k]
        assert cli.main(flags) == 0
        printed = capsys.readouterr().out
        assert "image_to_text_R@1" in printed
        assert ("ITM logit + similarity" in printed) == (k == "2")


# --------------------------------------------------------------------------------------------------------------- errors


def test_what_a_model_cannot_do_is_refused(blip2):
    assert {"generate", "caption"} <= set(blip2.abilities)
    matching, pictures = tiny.model(tiny.MATCHING), images(2)
    assert set(matching.abilities) == {"match", "retrieve", "ground", "encode_image", "encode_text"}
    with pytest.raises(MmjaxError, match="no LM head: LAVIS' files of the first stage have one"):
        matching.caption(pictures)
    with pytest.raises(MmjaxError, match="it does not take decoder_input_ids"):
        matching.forward(matching.pixels(pictures), decoder_input_ids=np.ones((2, 3), np.int32))
    with pytest.raises(MmjaxError, match=r"needs cross_from=0, query_feed_forward=True, .* 0, False, False, 0, False"):
        Blip2Config(tiny.VISION, qformer(query_feed_forward=False))
    with pytest.raises(MmjaxError, match=r"max_length=4 counts \[DEC\] and the prompt: 'a picture of' has 4 ids"):
        blip2.caption(pictures, "a picture of", max_length=4)
    with pytest.raises(MmjaxError, match="41 are more than positions=40"):
        blip2.caption(pictures, max_length=41)
    with pytest.raises(MmjaxError, match="stop: texts of blip2 end at"):
        blip2.generate(images=pictures, stop="hen", max_new_tokens=4)
    with pytest.raises(MmjaxError, match="generate needs images"):
        blip2.generate(["a"])
    with pytest.raises(MmjaxError, match="2 images and 1 texts: blip2 reads them in pairs"):
        blip2.generate(["a"], images=pictures)
    words = {word: i for i, word in enumerate(["[DEC]", *tiny_blip.VOCABULARY[:40]])}
    tokenizer = WordPieceTokenizer(wordpiece(words, lower=True))
    with pytest.raises(MmjaxError, match=r"its \[SEP\] is 4, the model's 3; its \[PAD\] is 1, .* its \[DEC\] is 0"):
        blip2.replace(tokenizer=tokenizer).match(pictures, TEXTS[:2])


def test_bfloat16_gives_nearly_the_same(blip2):
    """Of the whole network, and of the frozen image encoder alone."""
    pictures = images(2)
    expected = np.asarray(blip2.encode_image(pictures))
    vision = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), blip2.params["vision"])
    half = blip2.replace(
        config=dataclasses.replace(blip2.config, vision_dtype="bfloat16"), params={**blip2.params, "vision": vision}
    )
    whole = blip2.replace(
        config=dataclasses.replace(blip2.config, dtype="bfloat16"),
        params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), blip2.params),
    )
    for model in (half, whole):
        features = np.asarray(model.encode_image(pictures), np.float32)
        assert (features * expected).sum(-1).min() > 0.98 and np.abs(features - expected).max() > 1e-5


def test_captions_are_cleaned_as_in_lavis(blip2):
    long = " ".join(["Hen."] * 60)
    ids, _ = blip2.columns([long])
    expected = caption_columns(tiny.TOKENIZER, [" ".join(["hen"] * 50)], 40, sep=True)["input_ids"]
    np.testing.assert_array_equal(ids, expected)
