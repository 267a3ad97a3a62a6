"""The vault of BLIP-2's first stage: outputs, one step of pre-training, captions; negatives by argmax as recorded."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden.albef import RNG, gradient, hardest

from mmjax.generation.options import BeamRules
from mmjax.models.blip2.checkpoint_lavis import LAVIS
from mmjax.models.blip2.network import Blip2, Blip2Config
from mmjax.models.blip2.pretrain import Blip2Pretraining
from mmjax.models.blip2.tasks import Blip2Model
from mmjax.models.vit.network import ViT
from mmjax.weights.table import load_table, save_table


def config_of(recorded: dict[str, Any], shapes: dict[str, Any]) -> Blip2Config:
    """As the library infers it from the keys; no file has the heads and the id of [SEP]."""
    heads = {"vision_heads": recorded["vit_heads"], "text_heads": recorded["num_attention_heads"]}
    config, ids = LAVIS.config(shapes, heads), recorded["special_tokens"]
    assert (config.bos, config.queries, config.embed_dim) == (
        ids["bos"], recorded["num_query_token"], recorded["embed_dim"]
    )  # fmt: skip
    text, vision = config.qformer, config.vision
    assert list(range(0, text.depth, text.cross_every)) == recorded["cross_attention_layers"]
    assert (vision.epsilon, vision.norm_epsilon) == (recorded["vit"]["layer_norm_eps"], recorded["ln_vision_eps"])
    still = dataclasses.replace(text, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(config, qformer=still, sep=ids["sep"], pad=ids["pad"])


def check(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    names = LAVIS.unwrap(weights)
    assert LAVIS.recognise(names.keys(), None)
    config = config_of(meta["config"], {name: weights[key].shape for name, key in names.items()})
    table, arrays = LAVIS.table(config), {name: weights[key] for name, key in names.items()}
    variables = load_table(table, arrays, Blip2Model.shapes(config), meta["name"])
    saved = save_table(table, variables)
    assert saved.keys() == names.keys()
    for key, array in saved.items():
        np.testing.assert_array_equal(array, weights[names[key]], err_msg=key)
    params = jax.tree.map(jnp.asarray, variables["params"])
    batch = {name: tensors[f"inputs/{name}"].astype(np.int32) for name in ("input_ids", "attention_mask")}
    batch["image"] = np.moveaxis(tensors["inputs/image"], 1, -1)
    outputs, grads = pretraining(config, params, batch)
    for key, array in save_table(table, {"params": jax.tree.map(np.asarray, grads)}).items():
        outputs[f"grad/{key}"] = array
    return outputs | features(Blip2Model(config, params), batch)


def pretraining(config: Blip2Config, params: Any, batch: Any) -> tuple[dict[str, Any], Any]:
    method = Blip2Pretraining(config)
    encoded = jax.jit(lambda params, batch: method.encode(params, batch, RNG, None))(params, batch)
    negatives = hardest(method, params, batch, encoded)

    def loss(params: Any, batch: Any, negatives: Any) -> Any:
        encoded = method.encode(params, batch, RNG, None)
        itc = method.itc_loss(params, batch, encoded, None)
        itm, _, itm_logits = method.itm_loss(params, batch, encoded, negatives, RNG, None)
        lm, _, logits = method.lm_loss(params, batch, encoded, RNG, None)
        total = itc + itm.value + lm.value
        outputs = {"loss_itc": itc, "loss_itm": itm.value, "loss_lm": lm.value, "loss": total}
        return total, outputs | {"itm_logits": itm_logits, "itg_logits": logits}

    (_, outputs), grads = gradient(loss, params, batch, negatives)
    products = jnp.einsum("bqe,me->bmq", encoded.image_embeds, encoded.text_embeds).max(-1) / params["temperature"]
    outputs |= {"sim_i2t": products, "sim_t2i": products.T}
    outputs |= {"neg_image_idx": negatives[0], "neg_text_idx": negatives[1], "text_output": encoded.text}
    outputs |= {"image_embeds": encoded.image, "image_feats": encoded.image_embeds, "text_feat": encoded.text_embeds}

    def hidden(network: Blip2, ids: Any, mask: Any, tokens: Any) -> Any:
        x = network.qformer.embed(ids, queries=network._queries(len(ids)))
        states = network.qformer.run(x, network._with_queries(mask), tokens, queries=config.queries)[-1]
        return states, network.itm_head(states[:, : config.queries])

    ids, mask, tokens = batch["input_ids"], batch["attention_mask"], encoded.image
    pairs = jnp.concatenate([ids, ids, ids[negatives[1]]]), jnp.concatenate([mask, mask, mask[negatives[1]]])
    images = jnp.concatenate([tokens, tokens[negatives[0]], tokens])
    states, logits = jax.jit(lambda params, *arrays: Blip2(config).apply({"params": params}, *arrays, method=hidden))(
        params, *pairs, images
    )
    outputs |= {"itm_hidden": states, "itm_logits_per_query": logits}
    vision: Any = ViT(config.vision)
    outputs["vit_out"] = jax.jit(lambda p, x: vision.apply({"params": p}, x).states[-1])(
        params["vision"], batch["image"]
    )
    return outputs, grads


def features(model: Blip2Model, batch: Any) -> dict[str, Any]:
    columns = {name: batch[name] for name in ("input_ids", "attention_mask")}
    forward = model.forward(batch["image"], **columns)
    outputs: dict[str, Any] = {"query_output": forward["qformer_outputs"]["last_hidden_state"]}
    outputs |= {"multimodal_embeds": forward["multimodal_embeds"], "itm_score": forward["itm_logits"][:, 1]}
    for name, beams in (("greedy_ids", 1), ("beam3_ids", 3)):
        start = np.full((len(batch["image"]), 1), model.config.bos)
        options: dict[str, Any] = {"num_beams": beams, "beam_rules": BeamRules.v4_33()} if beams > 1 else {}
        ids = model.generate(start, pixel_values=batch["image"], max_new_tokens=11, min_new_tokens=3, **options)
        ids = np.concatenate([start, ids], axis=1)  # max_length=12 and min_length=4 count [DEC]
        outputs[name] = np.pad(ids, ((0, 0), (0, 12 - ids.shape[1])), constant_values=model.pad)
    return outputs
