"""FlamingoModel: who attends to which image, generation, prefixes, few shots, files, and every refusal."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_flamingo as tiny

import mmjax
from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.interface.few_shot import CAPTIONS, QUESTIONS, Example, FewShot
from mmjax.models.flamingo.config import FlamingoConfig, ResamplerConfig
from mmjax.models.flamingo.decode import FlamingoSteps
from mmjax.models.flamingo.network import CrossAttention, Flamingo
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.tasks import LanguageModel
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.resnet.tasks import ResNetModel
from mmjax.nn.resampler import Resampler
from mmjax.weights.files import read_weights, write_safetensors
from mmjax.weights.table import WeightsError

IMAGE, END = "<image>", "<|endofchunk|>"


# -------------------------------------------------------------------------------------------------- the frozen language


@pytest.mark.parametrize("family", ["mpt", "gpt_neox"])
def test_at_the_start_texts_have_the_language_models_logits_bit_for_bit(family):
    """With and without images, whose attention has a gate of zero."""
    model, language = tiny.fresh(family), tiny.language(family)
    ids, mask = tiny.prompts(model, [".......", "...."], 7)
    ids = ids * mask  # the language model has no id for padding
    expected = language.forward(input_ids=ids, attention_mask=mask)["logits"]
    size = language.config.vocab_size
    for pixels in (None, tiny.pixels(2, 1)):
        logits = model.forward(pixels, ids, mask)["logits"]
        assert logits.shape == (2, 7, size + 3)
        np.testing.assert_array_equal(logits[..., :size], expected)
    frozen = tree.flatten(model.params["language"])
    added = {"added_embedding"} | (set() if language.config.tied else {"added_head/kernel"})
    assert frozen.keys() == tree.flatten(language.params).keys() | added
    for path, leaf in tree.flatten(language.params).items():
        np.testing.assert_array_equal(frozen[path], leaf)


@pytest.mark.parametrize(
    ("config", "count", "blocks"),
    [
        (FlamingoConfig.open_flamingo_3b(), 944_019_504, tuple(range(24))),
        (FlamingoConfig.open_flamingo_4b(), 960_763_936, tuple(range(1, 32, 2))),
        (FlamingoConfig.open_flamingo_9b(), 1_178_834_960, tuple(range(3, 32, 4))),
    ],
)
def test_published_sizes(config, count, blocks):
    """The sheet's counts of the resampler and the cross attention."""
    assert config.crossed == blocks and config.vocab_size + config.added_tokens == 50_280
    media = jax.ShapeDtypeStruct((1, 1, 1, 256, 1024), jnp.float32)
    r, width = config.resampler, config.language.width
    resampler = Resampler(r.depth, r.heads, r.head_width, r.latents)
    layer = CrossAttention(width, config.heads, config.head_width, 4 * width)
    inputs = [jax.ShapeDtypeStruct((1, 3, n), jnp.float32) for n in (width, 1024)]
    shapes = [jax.eval_shape(module.init, jax.random.key(0), *arrays)["params"]
              for module, arrays in ((resampler, (media,)), (layer, inputs))]  # fmt: skip
    counts = [sum(math.prod(leaf.shape) for leaf in tree.flatten(part).values()) for part in shapes]
    assert counts[0] + len(blocks) * counts[1] == count


# ----------------------------------------------------------------------------------------------- who attends to what


@pytest.fixture(scope="module")
def model() -> FlamingoModel:
    return tiny.trained()


def test_a_token_attends_to_the_last_image_alone(model):
    """Another image that is not attended to leaves every bit; before the first image there is exactly nothing."""
    ids, mask = tiny.prompts(model, ["..i...i.."], 9)
    pixels = tiny.pixels(1, 2)
    logits = model.forward(pixels, ids, mask)["logits"][0]
    media = model.module.apply(model.variables, jnp.asarray(pixels[:, :, None]), method="encode_media")

    def crossed(module, x, media):
        """The first cross attention, whose tokens do not mix."""
        return module.before(media, jnp.asarray(ids))(1, x)

    x = jax.random.normal(jax.random.key(0), (1, 9, 12))
    apply = jax.jit(lambda media: model.module.apply(model.variables, x, media, method=crossed)[0])
    for changed, same in ((0, [0, 1, 6, 7, 8]), (1, [0, 1, 2, 3, 4, 5])):
        other = pixels.copy()
        other[0, changed] = tiny.pixels(1, 1, seed=9)[0, 0]
        moved = model.forward(other, ids, mask)["logits"][0]
        first = 2 if changed == 0 else 6
        np.testing.assert_array_equal(moved[:first], logits[:first])
        assert np.abs(moved[first] - logits[first]).max() > 1e-3
        alone = apply(media.at[0, changed].add(1.0))
        np.testing.assert_array_equal(alone[jnp.asarray(same)], apply(media)[jnp.asarray(same)])
    text = model.forward(None, ids[:, :2], mask[:, :2])["logits"][0]
    np.testing.assert_allclose(logits[:2], text, atol=1e-5)


def test_prompts_with_no_one_and_two_images_are_each_as_alone(model):
    ids, mask = tiny.prompts(model, ["......", "i....", "..i.i."], 6)
    pixels = tiny.pixels(3, 2)
    together = model.forward(pixels, ids, mask)["logits"]
    for row, count in enumerate((0, 1, 2)):
        length = int(mask[row].sum())
        alone = model.forward(pixels[row, None, :count] if count else None, ids[row, None, :length])["logits"][0]
        np.testing.assert_allclose(together[row, :length], alone, atol=2e-5)
    listed = np.concatenate([pixels[1, :1], pixels[2]])  # the images of all prompts in a row
    np.testing.assert_allclose(model.forward(listed, ids, mask)["logits"][2], together[2], atol=2e-5)


def test_all_images_so_far_if_configured():
    model = tiny.with_config(tiny.trained(), only_last=False)
    ids, mask = tiny.prompts(model, ["i..i.."], 6)
    pixels = tiny.pixels(1, 2)
    other = np.concatenate([tiny.pixels(1, 1, seed=9), pixels[:, 1:]], axis=1)
    logits, moved = (model.forward(x, ids, mask)["logits"] for x in (pixels, other))
    assert np.abs(logits[0, 5] - moved[0, 5]).max() > 1e-3


def test_videos():
    """Any number of frames, order and padding matter as they should."""
    fields = {"resampler": dataclasses.replace(tiny.RESAMPLER, frames=3, media=2)}
    config = dataclasses.replace(tiny.fresh().config, **fields)
    shapes = FlamingoModel.shapes(config)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), shapes)
    model = FlamingoModel(config, params, preprocess=tiny.clip().preprocess, tokenizer=tiny.fresh().tokenizer)
    ids, _ = tiny.prompts(model, ["i...", "i..."], 4)
    pixels = tiny.pixels(2, 1, 5)
    logits = model.forward(pixels, ids)["logits"]
    assert np.abs(model.forward(pixels[:, :, ::-1], ids)["logits"] - logits).max() > 1e-3
    frames = np.array([[[1, 1, 1, 1, 1]], [[1, 1, 0, 0, 0]]])
    masked = model.forward(pixels[..., :3, :, :, :], ids, frame_mask=frames[..., :3])["logits"]
    short = model.forward(pixels[1:, :, :2], ids[1:])["logits"]
    np.testing.assert_allclose(masked[1], short[0], atol=2e-5)
    videos = [np.stack(tiny.images(3)), np.stack(tiny.images(2, seed=1))]
    texts = model.generate([f"{IMAGE}the"] * 2, images=videos, max_new_tokens=5)
    assert texts[1] == model.generate(f"{IMAGE}the", images=[videos[1]], max_new_tokens=5)
    with pytest.raises(MmjaxError, match="3 images or videos in a prompt; the resampler has embeddings for 2"):
        model.forward(tiny.pixels(1, 3, 1), ids[:1])


def test_a_resnet_is_an_image_encoder():
    config = ResNetConfig((1, 1), "basic", "cifar", 3, (3, 5), num_classes=5)
    rng = np.random.default_rng(0)
    shapes = ResNetModel.shapes(config)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 1, leaf.shape), leaf.dtype), shapes)
    model = FlamingoModel.assemble(tiny.language(), ResNetModel(config, **variables), **tiny.SIZES)
    ids, _ = tiny.prompts(model, ["i..."], 4)
    outputs = model.forward(tiny.pixels(1, 1), ids)
    assert outputs["image_hidden_states"].shape == (1, 1, 3, 5)
    tokens = model.module.apply(model.variables, tiny.pixels(2), method="tokens")
    assert tokens.shape == (2, 16, 5)
    with pytest.raises(MmjaxError, match="the image encoder is one of CLIP with its projection"):
        mmjax.export(model, "/nowhere", layout="open_flamingo")


# ----------------------------------------------------------------------------------------------------------- generation


PROMPTS = [f"{IMAGE}the sea{END}{IMAGE}once", f"upon {IMAGE}a time"]


def test_steps_over_the_cache_are_the_full_pass(model):
    """Ragged prompts padded on the left, then two sequences an item, with the logits of the whole texts."""
    rng = np.random.default_rng(2)
    ids, mask = tiny.prompts(model, ["..i..i.", "i..."], 7)
    ids[1], mask[1] = np.roll(ids[1], 3), np.roll(mask[1], 3)
    pixels, new = tiny.pixels(2, 2), rng.integers(5, 250, (2, 2, 4))
    media = model.module.apply(model.variables, jnp.asarray(pixels[:, :, None]), method="encode_media")
    steps = FlamingoSteps(model.config)
    inputs = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask), "media": media}
    first, state = jax.jit(lambda inputs: steps.prefill(model.variables, inputs, 2, 4))(inputs)
    step = jax.jit(lambda ids, state: steps.step(model.variables, ids, state))
    whole = np.concatenate([np.repeat(ids, 2, 0), new.reshape(4, 4)], axis=1)
    whole_mask = np.concatenate([np.repeat(mask, 2, 0), np.ones((4, 4), int)], axis=1)
    rolled = np.stack([np.roll(row, -int((m == 0).sum())) for row, m in zip(whole, whole_mask)])  # no padding before
    lengths = whole_mask.sum(1)
    right = (np.arange(11) < lengths[:, None]).astype(np.int32)
    expected = np.asarray(model.forward(np.repeat(pixels, 2, 0), rolled, right)["logits"])
    for row in range(4):
        np.testing.assert_allclose(first[row // 2], expected[row, lengths[row] - 5], atol=2e-5)
    for i in range(4):
        logits, state = step(jnp.asarray(new[:, :, i]), state)
        for row in range(4):
            np.testing.assert_allclose(logits[row // 2, row % 2], expected[row, lengths[row] - 4 + i], atol=2e-5)


def test_a_batch_is_its_prompts_one_by_one(model):
    images = tiny.images(3)
    options = {"num_beams": 3, "length_penalty": 0.0, "max_new_tokens": 5}
    together = model.generate(PROMPTS, images=images, **options)
    assert together == model.generate(PROMPTS, images=[images[:2], images[2:]], **options)
    alone = [model.generate(PROMPTS[0], images=images[:2], **options)]
    assert together == [*alone, model.generate(PROMPTS[1], images=images[2], **options)]
    assert model.generate("the sea", max_new_tokens=3) == "".join(model.stream("the sea", max_new_tokens=3))
    assert model.eos == (model.config.end_of_chunk,)


def test_a_prefix_is_encoded_once_and_gives_the_same_ids(model):
    images = tiny.images(4)
    start = f"{IMAGE}Output:the sea{END}\n{IMAGE}Output:a time{END}\n"
    prefix = model.encode_prefix(start, images[:2])
    queries = [f"{IMAGE}Output:", f"{IMAGE}Output:the"]
    for options in ({}, {"num_beams": 3, "length_penalty": 0.0}):
        options = {"max_new_tokens": 6, **options}
        cached = model.generate(queries, images=images[2:], prefix=prefix, **options)
        lists = [[*images[:2], image] for image in images[2:]]
        assert cached == model.generate([start + query for query in queries], images=lists, **options)
    without = model.encode_prefix("once upon", None)
    assert model.generate([f" a {IMAGE}"], images=images[:1], prefix=without, max_new_tokens=4) == model.generate(
        [f"once upon a {IMAGE}"], images=images[:1], max_new_tokens=4
    )
    assert model.generate([" a time"], prefix=without, max_new_tokens=4) == model.generate(
        ["once upon a time"], max_new_tokens=4
    )
    with pytest.raises(MmjaxError, match="the tokens of a prefix that ends 'once upo' change before 'n a'"):
        model.generate(["n a"], prefix=model.encode_prefix("once upo"))


# ------------------------------------------------------------------------------------------------------------ few shots


def test_few_shots(model):
    images = tiny.images(6)
    examples = [Example(image, word, "where") for image, word in zip(images, ("sea", "fruit", "time", "blue"))]
    queries = [images[2], images[1]]
    fixed = FewShot(model, examples, QUESTIONS, 2)
    texts = fixed(queries, ["what", "which"])
    start = "".join(f"{IMAGE}Question:where Short answer:{word}{END}\n" for word in ("sea", "fruit"))
    whole = [f"{start}{IMAGE}Question:{question} Short answer:" for question in ("what", "which")]
    lists = [[*images[:2], query] for query in queries]
    options = {"max_new_tokens": 5, "num_beams": 3, "length_penalty": 0.0}
    expected = model.generate(whole, images=lists, **options)
    assert texts == [QUESTIONS.cleaned(text) for text in expected]
    assert texts == model.answer(queries, ["what", "which"], examples=examples, shots=2)
    # The most similar image, which is the query's own, stands last.
    nearest = FewShot(model, examples, CAPTIONS, 3, "rices").select(queries)
    assert [indices[-1] for indices in nearest] == [2, 1] and all(len(set(indices)) == 3 for indices in nearest)
    drawn = FewShot(model, examples, CAPTIONS, 3, "random", seed=1)
    assert drawn.select(queries) == drawn.select(queries) != dataclasses.replace(drawn, seed=2).select(queries)
    assert drawn.facts() == {
        "shots": 3,
        "selection": "random",
        "seed": 1,
        "query": f"{IMAGE}Output:",
        "end": END,
        "separator": "\n",
    }
    # Zero shots: two examples without their images.
    zero = model.caption(queries, examples, shots=0, max_new_tokens=4)
    start = f"Output:sea{END}\nOutput:fruit{END}\n"
    options["max_new_tokens"] = 4
    expected = model.generate([f"{start}{IMAGE}Output:"] * 2, images=queries, **options)
    assert zero == [CAPTIONS.cleaned(text) for text in expected]
    assert model.caption(queries, max_new_tokens=4) == [
        CAPTIONS.cleaned(text) for text in model.generate([f"{IMAGE}Output:"] * 2, images=queries, **options)
    ]


def test_answers_of_a_list_are_ranked(model):
    """Against the logits of whole texts; the examples before the question are encoded once."""
    images, answers = tiny.images(3), ["sea", "a time", "three"]
    examples = [Example(images[0], "blue", "where")]
    ranked = model.answer(images[1:], ["what", "which"], answers, top=3, examples=examples)
    start = f"{IMAGE}Question:where Short answer:blue{END}\n"
    for image, question, row in zip(images[1:], ("what", "which"), ranked):
        prompt = model.tokenizer.encode([f"{start}{IMAGE}Question:{question} Short answer:"])[0]
        pixels = model.image_inputs([images[0], image])["pixel_values"][None, :, 0]
        means = []
        for ids in model.tokenizer.encode(answers, False):
            log_probs = jax.nn.log_softmax(model.forward(pixels, np.array([prompt + ids]))["logits"][0])
            means.append(np.mean([log_probs[len(prompt) - 1 + i, id] for i, id in enumerate(ids)]))
        expected = np.asarray(jax.nn.softmax(jnp.asarray(means)))
        order = np.argsort(-expected)
        assert [name for name, _ in row] == [answers[i] for i in order]
        np.testing.assert_allclose([p for _, p in row], expected[order], rtol=1e-4)
    best = model.rank(f"{IMAGE}Output:", answers, images=images[0], k=1)
    assert len(best) == len(best[0]) == 1 and best[0][0][1] == 1
    with pytest.raises(MmjaxError, match="answers of a list are ranked: num_beams would have no effect"):
        model.answer(images[:1], ["what"], answers, num_beams=2)
    with pytest.raises(MmjaxError, match=r"answers: \[\] should be a list of strings"):
        model.rank("a", [])


def test_answers_are_cleaned_as_in_the_original():
    assert CAPTIONS.cleaned(' a "red" henOutput: another') == "a red hen"
    assert QUESTIONS.cleaned("red, blueQuestion: what") == "red" and QUESTIONS.cleaned("a henShort") == "a hen"


def test_few_shot_refusals(model):
    with pytest.raises(MmjaxError, match="shots=2, selection='rices' of 1 examples"):
        FewShot(model, [Example(None, "a")], CAPTIONS, 2, "rices")
    with pytest.raises(MmjaxError, match="2 images and 1 questions"):
        model.answer(tiny.images(2), ["what"])


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("family", ["mpt", "opt"])
def test_a_whole_model_comes_back_with_the_same_bits(family, tmp_path):
    model = tiny.trained(family)
    assert mmjax.export(model, tmp_path / "public", layout="open_flamingo") == ()
    mmjax.save(model, tmp_path / "own")
    for folder in ("public", "own"):
        loaded = mmjax.load(tmp_path / folder)
        assert isinstance(loaded, FlamingoModel) and loaded.config == model.config
        assert tree.tree_hash(loaded.params) == tree.tree_hash(model.params)
        assert loaded.preprocess == dataclasses.replace(model.preprocess, crop_rounding=loaded.preprocess.crop_rounding)
        assert loaded.tokenizer.encode([PROMPTS[0]]) == model.tokenizer.encode([PROMPTS[0]])
    keys = read_weights(tmp_path / "public" / "model.safetensors").arrays.keys()
    assert not any("old_decoder_blocks" in key or "gated_cross_attn_layers" in key for key in keys)


@pytest.mark.parametrize("family", ["mpt", "gpt_neox"])
def test_training_files(family, tmp_path):
    """What OpenFlamingo's training writes, read over the language model and the image encoder; other names too."""
    model = tiny.trained(family)
    model.save_trained(tmp_path / "checkpoint.safetensors")
    arrays = dict(read_weights(tmp_path / "checkpoint.safetensors").arrays)
    assert not any("decoder_layer" in key or "vision" in key for key in arrays)
    assert any("gated_cross_attn_layer." in key for key in arrays)
    sizes = {name: tiny.SIZES[name] for name in ("resampler", "heads", "head_width")}
    read = FlamingoModel.assemble(tiny.language(family), tiny.clip(), tmp_path / "checkpoint.safetensors", **sizes)
    assert read.config == model.config and tree.tree_hash(read.params) == tree.tree_hash(model.params)
    renamed = {f"module.{other_name(key, family)}": array for key, array in arrays.items()}
    write_safetensors(tmp_path / "renamed.safetensors", renamed)
    read = FlamingoModel.assemble(tiny.language(family), tiny.clip(), tmp_path / "renamed.safetensors", **sizes)
    assert tree.tree_hash(read.params) == tree.tree_hash(model.params)
    arrays.pop("perceiver.norm.bias")
    write_safetensors(tmp_path / "short.safetensors", arrays)
    with pytest.raises(WeightsError, match=r"missing \(1\):\n    perceiver.norm.bias"):
        FlamingoModel.assemble(tiny.language(family), tiny.clip(), tmp_path / "short.safetensors", **sizes)
    with pytest.raises(WeightsError, match=r"the trained part of a Flamingo alone.*FlamingoModel.assemble"):
        mmjax.load(tmp_path / "checkpoint.safetensors")


def other_name(key: str, family: str) -> str:
    blocks = {"mpt": "transformer.blocks", "gpt_neox": "gpt_neox.layers"}[family]
    if "gated" not in key:
        return key
    return key.replace(blocks, "gated_cross_attn_layers").replace(".gated_cross_attn_layer.", ".")


def test_file_refusals(tmp_path):
    tiny.trained("mpt").save_trained(tmp_path / "mpt.safetensors")
    sizes = {name: tiny.SIZES[name] for name in ("resampler", "heads", "head_width")}
    with pytest.raises(WeightsError, match=r"missing \(22\):\n    lang_encoder.gpt_neox.layers.0.gated"):
        FlamingoModel.assemble(tiny.language("gpt_neox"), tiny.clip(), tmp_path / "mpt.safetensors", **sizes)
    longer = tiny.language().replace(tokenizer=None)
    longer = longer.replace(config=dataclasses.replace(longer.config, added_tokens=1))
    with pytest.raises(MmjaxError, match="a decoder without added tokens"):
        FlamingoModel.assemble(longer, tiny.clip())
    with pytest.raises(MmjaxError, match="the image encoder of a Flamingo is a CLIP, a ViT or a ResNet"):
        FlamingoModel.assemble(tiny.language(), tiny.language())
    tokenizer = tiny.trained().tokenizer
    with pytest.raises(MmjaxError, match=r"the file's embedding has .* rows; the tokenizer has"):
        FlamingoModel.assemble(tiny.language("mpt").replace(tokenizer=tokenizer_with_more()), tiny.clip(),
                               tmp_path / "mpt.safetensors", **sizes)  # fmt: skip
    assert tokenizer.vocab_size == tiny.language().tokenizer.vocab_size + 3


def tokenizer_with_more():
    """The same with its last id gone from the embedding's point of view: padding is there already."""
    tokenizer = tiny.language().tokenizer
    return dataclasses.replace(tokenizer, special={**tokenizer.special, "pad_token": "</s>"})


# ------------------------------------------------------------------------------------------------------------- refusals


def test_configs_that_do_not_fit():
    language = DecoderConfig.mpt(8, 2, 2, vocab_size=9)
    vision = tiny.CLIP.tower
    with pytest.raises(MmjaxError, match="every=3, first=None: none of 2 blocks"):
        FlamingoConfig(vision, language, every=3, image_token=1, end_of_chunk=2)
    with pytest.raises(MmjaxError, match="image_token=9, end_of_chunk=2: two different ids below 9"):
        FlamingoConfig(vision, language, image_token=9, end_of_chunk=2)


def test_every_refusal(model):
    ids, mask = tiny.prompts(model, ["i.i.", "...."], 4)
    with pytest.raises(MmjaxError, match="prompt 0 has 2 times the image id for 1 images"):
        model.forward(tiny.pixels(2, 1), ids, mask)
    with pytest.raises(MmjaxError, match=r"the prompts have 2 times <image> \(2, 0\) for 3 images"):
        model.forward(tiny.pixels(3), ids, mask)
    with pytest.raises(MmjaxError, match=r"the prompts have 1 times <image> \(1\) for 0 images"):
        model.generate(f"{IMAGE}a")
    with pytest.raises(MmjaxError, match="a prompt has 1 times <image> for 2 images"):
        model.generate([f"{IMAGE}a", "b"], images=[tiny.images(2), []])
    with pytest.raises(MmjaxError, match="images: 1 lists for 2 prompts"):
        model.generate([f"{IMAGE}a", "b"], images=[tiny.images(2)])
    with pytest.raises(MmjaxError, match="needs prompts, with <image> where an image is"):
        model.generate(images=tiny.images(1))
    with pytest.raises(MmjaxError, match=r"more than this model has positions for \(97\)"):
        tiny.trained("opt").generate("the sea", max_new_tokens=97)
    assert isinstance(model.module, Flamingo) and isinstance(tiny.language(), LanguageModel)
    assert ResamplerConfig() == FlamingoConfig.open_flamingo_3b().resampler
