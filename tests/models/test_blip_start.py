"""Where BLIP's runs start: a pre-training file for each task, as the original loads it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_blip as tiny

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.models.blip.network import BlipConfig
from mmjax.models.blip.start import starting_weights
from mmjax.models.blip.tasks import BlipModel
from mmjax.nn.positions import interpolate
from mmjax.training.initial_parts import initial_parts

WIDE = dataclasses.replace(tiny.VISION, image_size=(12, 12))
PRETRAINED = dataclasses.replace(tiny.PRETRAINING, holds_state=True)


def random_model(config: BlipConfig, seed: int = 0) -> BlipModel:
    rng = np.random.default_rng(seed)

    def leaf(shape: Any) -> Any:
        values = rng.normal(size=shape.shape) if shape.dtype == jnp.float32 else np.full(shape.shape, 5)
        return jnp.asarray(values, shape.dtype)

    return BlipModel(config, **jax.tree.map(leaf, BlipModel.shapes(config)))


def started(config: BlipConfig, model: BlipModel) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], set[str]]:
    """(taken weights, their parameters by path, the source's by path, the paths that start afresh), all checked."""
    weights = starting_weights(model.weights(), config)
    taken, source = tree.flatten(weights["params"]), tree.flatten(model.params)
    expected = tree.flatten(BlipModel.shapes(config)["params"])
    assert taken.keys() <= expected.keys()
    assert all(leaf.shape == expected[path].shape for path, leaf in taken.items())
    positions = interpolate(source["vision/positions"], (2, 2), (3, 3), "bicubic", 1)
    np.testing.assert_array_equal(taken["vision/positions"], positions)
    return weights, taken, source, set(expected) - set(taken)


def test_retrieval_takes_everything_but_the_decoder_and_its_queues_know_no_image():
    """The public files of retrieval have another pointer than those of pre-training, and so it starts at 0."""
    config = dataclasses.replace(tiny.RETRIEVAL, vision=WIDE)
    model = random_model(PRETRAINED)
    weights, taken, source, fresh = started(config, model)
    assert not fresh and not any(path.startswith("decoder/") for path in taken)
    for path in taken.keys() - {"vision/positions"}:
        np.testing.assert_array_equal(taken[path], source[path])
    momentum = tree.flatten(model.stats["momentum"])
    ema = tree.flatten(weights["ema"])
    assert ema.keys() == momentum.keys() and ema["vision/positions"].shape == taken["vision/positions"].shape
    np.testing.assert_array_equal(ema["text_proj/kernel"], momentum["text_proj/kernel"])
    queues = weights["queues"]
    np.testing.assert_array_equal(queues["image"]["keys"], model.stats["queue"]["image"])
    assert (np.asarray(queues["ids"]["keys"]) == -100).all() and queues["ids"]["keys"].shape == (48, 1)
    assert all(int(queue["cursor"]) == 0 for queue in queues.values())


@pytest.mark.parametrize("kind", ["captioner", "vqa"])
def test_decoders_get_what_they_shared_with_the_encoder(kind: str):
    config = dataclasses.replace({"captioner": tiny.CAPTIONER, "vqa": tiny.VQA}[kind], vision=WIDE)
    weights, taken, source, fresh = started(config, random_model(PRETRAINED))
    # The decoder of answers attends to states 16 wide, of captions to an image 24 wide.
    keys_and_values = {f"decoder/encoder/block_{i}/cross_attention/{x}/kernel" for i in (0, 1) for x in "kv"}
    assert fresh == (keys_and_values if kind == "vqa" else set()) and weights.keys() == {"params"}
    for path in (path for path in taken if path.startswith("decoder/")):
        shared = path not in source
        np.testing.assert_array_equal(taken[path], source[path.replace("decoder/", "text/", 1) if shared else path])
    assert ("text/encoder/block_0/attention/q/kernel" in taken) == (kind == "vqa")


def test_nlvr_copies_each_cross_attention_to_both_images():
    config = dataclasses.replace(tiny.NLVR, vision=WIDE)
    _, taken, source, fresh = started(config, random_model(PRETRAINED))
    names = {path.split("cross_attention/")[-1].split("/")[0] for path in taken if "cross_attention" in path}
    assert names == {"first", "second"}
    for path in (path for path in taken if "/first/" in path or "/second/" in path):
        original = path.replace("/first", "").replace("/second", "")
        np.testing.assert_array_equal(taken[path], source[original])
    merge = {f"text/encoder/block_1/cross_attention/merge/{name}" for name in ("kernel", "bias")}
    assert fresh == merge | {f"cls_{part}/{name}" for part in ("hidden", "head") for name in ("kernel", "bias")}
    # Fine-tuned again, everything is taken.
    _, _, _, fresh = started(config, random_model(tiny.NLVR))
    assert not fresh
    classes = dataclasses.replace(config, classes=3)
    _, _, _, fresh = started(classes, random_model(tiny.NLVR))
    assert {path.split("/")[0] for path in fresh} == {"cls_hidden", "cls_head"}


def test_pretraining_goes_on_with_all_of_it():
    config = dataclasses.replace(tiny.PRETRAINING, vision=WIDE)
    weights, _, _, fresh = started(config, random_model(PRETRAINED))
    assert not fresh and weights["queues"].keys() == {"image", "text"} and weights["ema"].keys() == {
        "vision", "text", "vision_proj", "text_proj"
    }  # fmt: skip


def test_weights_that_lack_a_part_are_refused():
    with pytest.raises(MmjaxError, match="not the weights of a BLIP: they have no vision/positions"):
        starting_weights({"params": {"encoder": {}}}, tiny.RETRIEVAL)
    with pytest.raises(MmjaxError, match=r"the network has decoder, and these weights, of .*, have not"):
        starting_weights(random_model(tiny.ITM).weights(), tiny.CAPTIONER)
    with pytest.raises(MmjaxError, match="the network has text, and these weights"):
        starting_weights(random_model(tiny.CAPTIONER).weights(), tiny.RETRIEVAL)


def test_a_bert_starts_the_encoder_and_what_the_decoder_has_of_its_own():
    """The vocabulary grows by [DEC] and [ENC]; token types and the pooler stay behind; cross attention is fresh."""
    config = BertConfig(tiny.VOCAB - 2, 16, 2, 2, 22, 40, mlm=True)
    rng = np.random.default_rng(0)
    shapes = BertModel.shapes(config)["params"]
    bert = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    expected = BlipModel.shapes(tiny.PRETRAINING)["params"]
    parts = ("text", "decoder")
    weights = initial_parts(lambda _: {"params": bert}, expected, tiny.VISION, text="bert", text_parts=parts)
    taken, source = tree.flatten(weights["params"]), tree.flatten(bert)
    fresh = {path for path in tree.flatten(expected) if path.split("/")[0] in parts} - taken.keys()
    assert all("/cross_" in path for path in fresh) and len(fresh) == 2 * 10
    query = "encoder/block_1/attention/q/kernel"
    for part in parts:
        np.testing.assert_array_equal(taken[f"{part}/{query}"], source[query])
    np.testing.assert_array_equal(taken["decoder/mlm_bias"], np.append(source["mlm_bias"], [0, 0]))
    assert taken["text/embeddings/words"].shape == (tiny.VOCAB, 16) and "decoder/embeddings/words" not in taken
    assert set(weights["origins"].values()) == {"bert"}
