"""BLIP's networks: sizes, what three roles share, text alone and with images, and two images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_blip as tiny

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.bert.network import BertConfig
from mmjax.models.blip.network import BlipConfig


def apply(config, params, name, *arrays):
    run = jax.jit(
        lambda params, *arrays: config.network().apply({"params": config.module_params(params)}, *arrays, method=name)
    )
    return run(params, *arrays)


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("config", "parameters", "momentum"),
    [
        (BlipConfig.base(), 252_441_919, 223_450_880),
        (BlipConfig.large(), 474_729_023, 445_737_984),
        (BlipConfig.itm(large=True), 446_128_642, None),
        (BlipConfig.retrieval(), 223_744_259, None),
        (BlipConfig.captioner(), 223_971_644, None),
        (BlipConfig.vqa(), 361_478_972, None),
        (BlipConfig.nlvr(), 259_372_034, None),
    ],
    ids=["base", "large", "itm-large", "retrieval", "captioner", "vqa", "nlvr"],
)
def test_published_sizes(config: BlipConfig, parameters: int, momentum: int | None):
    """The counts of the original's networks, shared arrays once; retrieval is ITM (223,744,258) with a temperature."""
    shapes = tiny.shapes(config)
    assert tree.count(shapes) == parameters
    if momentum is not None:
        assert tree.count({part: shapes[part] for part in config.momentum_parts}) == momentum


def test_stochastic_depth_is_that_of_the_original():
    """blip.py:205 and blip_vqa.py, blip_nlvr.py: always with ViT-L; in VQA and NLVR2 with ViT-B too."""
    rates = [config.vision.drop_path for config in (BlipConfig.base(), BlipConfig.vqa(), BlipConfig.nlvr())]
    assert rates == [0.0, 0.1, 0.1]
    assert BlipConfig.captioner(large=True).vision.drop_path == BlipConfig.large().vision.drop_path == 0.1


# -------------------------------------------------------------------------------------------------------------- sharing


def test_the_decoder_stores_its_self_attention_and_its_head_alone():
    params = tiny.init(tiny.PRETRAINING)
    paths = set(tree.flatten(params["decoder"]))
    names = {"/".join(path.split("/")[2:3] if path.startswith("encoder") else path.split("/")[:1]) for path in paths}
    assert names == {"attention", "norm_1", "mlm_transform", "mlm_bias"}
    whole = tiny.PRETRAINING.module_params(params)
    assert tree.flatten(whole["decoder"]).keys() == tree.flatten(tiny.shapes(tiny.VQA)["decoder"]).keys() | {
        path for path in tree.flatten(params["text"]) if "cross_attention" in path
    }
    assert whole["decoder"]["embeddings"]["words"] is params["text"]["embeddings"]["words"]
    assert whole["decoder"]["encoder"]["block_0"]["norm_1"] is not params["text"]["encoder"]["block_0"]["norm_1"]
    again = tiny.PRETRAINING.stored_params(whole)
    assert tree.flatten(again).keys() == tree.flatten(params).keys()


def test_gradients_of_the_three_roles_add_up():
    """Of an array that all roles share, the gradient of the sum of losses is the sum of the roles' gradients; the
    decoder's own self-attention has one of its own."""
    text, decoder = (dataclasses.replace(part, depth=1) for part in (tiny.TEXT, tiny.DECODER))
    config, inputs = dataclasses.replace(tiny.PRETRAINING, text=text, decoder=decoder), tiny.inputs()
    params, network = tiny.init(config), config.network()

    def role(name):
        def loss(params):
            out = network.apply({"params": config.module_params(params)}, **inputs)
            return jnp.mean(out[name] * jnp.cos(jnp.arange(out[name].size).reshape(out[name].shape)))

        return loss

    names = ("text_embeds", "itm_logits", "decoder_logits")

    @jax.jit
    def gradients(params):
        return [jax.grad(role(name))(params) for name in names], jax.grad(lambda p: sum(role(n)(p) for n in names))(
            params
        )

    parts, whole = gradients(params)
    words = [part["text"]["embeddings"]["words"] for part in parts]
    assert all(np.abs(word).max() > 1e-6 for word in words)
    jax.tree.map(
        lambda total, *terms: np.testing.assert_allclose(total, sum(terms), rtol=1e-4, atol=1e-5), whole, *parts
    )
    cross = [part["text"]["encoder"]["block_0"]["cross_attention"]["k"]["kernel"] for part in parts]
    assert not cross[0].any() and cross[1].any() and cross[2].any()
    decoder = [part["decoder"]["encoder"]["block_0"]["attention"]["q"]["kernel"] for part in parts]
    assert not decoder[0].any() and not decoder[1].any() and decoder[2].any()


# --------------------------------------------------------------------------------------------------------------- passes


def test_a_text_alone_does_not_depend_on_the_image():
    config, inputs = tiny.ITM, tiny.inputs()
    params = tiny.init(config)
    out = config.network().apply({"params": params}, **inputs)
    other = config.network().apply({"params": params}, **{**inputs, "images": inputs["images"][::-1]})
    np.testing.assert_array_equal(out["text_embeds"], other["text_embeds"])
    assert np.abs(out["itm_logits"] - other["itm_logits"]).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(out["image_embeds"], axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("config", [tiny.PRETRAINING, tiny.VQA, tiny.CAPTIONER], ids=["shared", "vqa", "captioner"])
def test_padding_changes_nothing(config: BlipConfig):
    """Of texts: the states, the heads and the decoder's logits at tokens."""
    inputs, params = tiny.inputs(), tiny.init(config)
    variables = {"params": config.module_params(params)}
    out = config.network().apply(variables, **inputs)
    wider = {name: np.pad(inputs[name], ((0, 0), (0, 4))) for name in ("ids", "mask")}
    padded = config.network().apply(variables, inputs["images"], **wider)
    at = inputs["mask"] == 1
    np.testing.assert_allclose(padded["decoder_logits"][:, :7][at], out["decoder_logits"][at], atol=2e-5)
    if config.matching:
        np.testing.assert_allclose(padded["itm_logits"], out["itm_logits"], atol=1e-5)


def test_the_decoder_is_causal_and_reads_the_image():
    config, inputs = tiny.CAPTIONER, tiny.inputs(2, 7)
    params = tiny.init(config)
    tokens = apply(config, params, "encode_image", inputs["images"])
    logits = apply(config, params, "decode", inputs["ids"], None, tokens)
    changed = inputs["ids"].copy()
    changed[:, 4] = 5
    later = apply(config, params, "decode", changed, None, tokens)
    np.testing.assert_array_equal(later[:, :4], logits[:, :4])
    assert np.abs(later[:, 4:] - logits[:, 4:]).max() > 0.01
    assert np.abs(apply(config, params, "decode", inputs["ids"], None, tokens[::-1]) - logits).max() > 0.01


# ----------------------------------------------------------------------------------------------------------- two images


def test_two_images_are_averaged_below_and_merged_above():
    """Below `merge_from` the result is the mean, and so the same for images and attentions exchanged together; a
    merging matrix tells the two apart."""
    config, inputs = tiny.NLVR, tiny.inputs()
    params = tiny.init(config)
    block_0, block_1 = (params["text"]["encoder"][f"block_{i}"]["cross_attention"] for i in range(2))
    assert block_0.keys() == {"first", "second"} and block_1.keys() == {"first", "second", "merge"}
    tokens = apply(config, params, "encode_image", inputs["images"])
    columns = inputs["ids"], inputs["mask"]
    states = apply(config, params, "encode_multimodal", *columns, tokens, tokens[::-1])

    def exchange(cross):
        return cross | {"first": cross["second"], "second": cross["first"]}

    flat = tree.flatten(params)
    cross = {path: leaf for path, leaf in flat.items() if "/cross_attention/" in path}
    exchanged = tree.unflatten(
        flat
        | {
            path.replace("/first/", "/other/").replace("/second/", "/first/").replace("/other/", "/second/"): leaf
            for path, leaf in cross.items()
        }
    )
    merge = exchanged["text"]["encoder"]["block_1"]["cross_attention"]["merge"]
    half = jnp.split(merge["kernel"], 2)
    merge["kernel"] = jnp.concatenate(half[::-1])
    again = apply(config, exchanged, "encode_multimodal", *columns, tokens[::-1], tokens)
    np.testing.assert_allclose(again, states, atol=1e-5)
    merge["kernel"] = jnp.concatenate(half)
    unmerged = apply(config, exchanged, "encode_multimodal", *columns, tokens[::-1], tokens)
    assert np.abs(unmerged - states).max() > 0.01


def test_gradients_reach_both_images():
    config, inputs = tiny.NLVR, tiny.inputs()
    params = tiny.init(config)

    def loss(images, other):
        return jnp.sum(
            jnp.square(
                config.network().apply({"params": params}, **{**inputs, "images": images}, other_images=other)["logits"]
            )
        )

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(inputs["images"], inputs["images"][::-1]):
        assert np.abs(gradient).max(axis=(1, 2, 3)).min() > 1e-6


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (tiny.CAPTIONER, {"matching": True}, "without a text encoder there is a decoder alone"),
        (tiny.ITM, {"text": dataclasses.replace(tiny.TEXT, cross_from=1)}, "cross_from=0"),
        (tiny.CAPTIONER, {"decoder": tiny.TEXT}, "causal=True and mlm=True"),
        (tiny.VQA, {"shared": True, "decoder": dataclasses.replace(tiny.DECODER, depth=1)}, "shared=True needs"),
        (tiny.NLVR, {"matching": True}, "the head of classes alone"),
    ],
    ids=["captioner", "cross_from", "decoder", "shared", "two images"],
)
def test_parts_that_do_not_fit(config, fields, message):
    with pytest.raises(MmjaxError, match=message):
        dataclasses.replace(config, **fields)


def test_a_decoder_does_not_attend_to_two_images():
    with pytest.raises(MmjaxError, match="merge_from=1: two contexts are of an encoder"):
        BertConfig(cross_from=0, merge_from=1, causal=True)


def test_the_number_of_images_is_checked():
    inputs = tiny.inputs()
    with pytest.raises(MmjaxError, match="two_images=True: images of a text: 1"):
        jax.eval_shape(lambda: tiny.NLVR.network().init(jax.random.key(0), **inputs))
    with pytest.raises(MmjaxError, match="two_images=False: images of a text: 2"):
        jax.eval_shape(lambda: tiny.ITM.network().init(jax.random.key(0), **inputs, other_images=inputs["images"]))
