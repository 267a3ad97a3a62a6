"""The vault of BLIP-2's second stage with OPT: features, prompts with queries, logits, loss, gradients and ids."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.generation.engine import generate
from mmjax.generation.options import BeamRules
from mmjax.models.blip2_language.checkpoint_lavis import LAVIS
from mmjax.models.blip2_language.tasks import Blip2LanguageModel
from mmjax.models.vision_language.network import QueryConnector, VisionLanguageConfig
from mmjax.models.vision_language.pretrain import PrefixLM
from mmjax.text.image_prompts import feature_index
from mmjax.text.packing import IGNORED
from mmjax.training.state import Carry
from mmjax.weights.table import load_table, save_table


def config_of(recorded: dict[str, Any], shapes: dict[str, Any]) -> VisionLanguageConfig:
    """As the library infers it from the keys and a config.json; no array has the heads."""
    fields = {"vision_heads": recorded["vit_heads"], "text_heads": recorded["num_attention_heads"]}
    config = LAVIS.config(shapes, fields | {"text_config": recorded["opt"]})
    assert isinstance(config.connector, QueryConnector) and config.connector.queries == recorded["num_query_token"]
    text, vision = config.connector.qformer, config.vision
    assert (text.epsilon, text.cross_every) == (recorded["layer_norm_eps"], recorded["cross_attention_freq"])
    assert (vision.epsilon, vision.norm_epsilon) == (recorded["vit"]["layer_norm_eps"], recorded["ln_vision_eps"])
    assert config.language.epsilon == recorded["opt_layer_norm_eps"]
    still = dataclasses.replace(text, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(config, connector=dataclasses.replace(config.connector, qformer=still))


def check(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    names = LAVIS.unwrap(weights)
    assert LAVIS.recognise(names.keys(), None)
    arrays = {name: weights[key] for name, key in names.items()}
    config = config_of(meta["config"], {name: array.shape for name, array in arrays.items()})
    table = LAVIS.table(config)
    variables = load_table(table, arrays, Blip2LanguageModel.shapes(config), meta["name"])
    saved = save_table(table, variables)
    assert saved.keys() | {"opt_model.lm_head.weight"} == arrays.keys()
    for key, array in saved.items():
        np.testing.assert_array_equal(array, arrays[key], err_msg=key)
    model = Blip2LanguageModel(config, jax.tree.map(jnp.asarray, variables["params"]))
    pixels = jnp.asarray(np.moveaxis(tensors["inputs/image"], 1, -1))
    inputs = {
        name: tensors[f"inputs/{name}"].astype(np.int32) for name in ("input_ids", "attention_mask", "prompt_ids")
    }
    outputs, batch = forwarded(model, pixels, inputs, meta["config"]["prompt_length"])
    method = PrefixLM(config)

    def loss(params: Any, batch: Any) -> Any:
        return method.loss(params, Carry(), batch, jax.random.key(0), jnp.int32(0))[0].value

    outputs["loss"], grads = jax.jit(jax.value_and_grad(loss))(model.params, batch)
    for key, array in save_table(table, {"params": jax.tree.map(np.asarray, grads)}).items():
        outputs[f"grad/{key}"] = array
    return outputs | generated(model, pixels, inputs["prompt_ids"], meta)


def forwarded(
    model: Blip2LanguageModel, pixels: Any, inputs: dict[str, np.ndarray], prompt_length: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(outputs, the batch of `PrefixLM`)."""
    ids, mask, q = inputs["input_ids"], inputs["attention_mask"], model.config.tile_tokens
    ran = model.forward(pixels, ids, mask)
    outputs = {
        "image_embeds": ran["vision_outputs"]["last_hidden_state"],
        "query_output": ran["qformer_outputs"]["last_hidden_state"],
        "opt_prefix": ran["image_hidden_states"],
        "logits": ran["logits"],
    }
    longer, outputs["full_attention_mask"] = model.with_queries(ids, mask, len(pixels))
    labels = np.where(outputs["full_attention_mask"] == 1, longer, IGNORED)
    labels[:, : q + prompt_length] = IGNORED
    outputs["labels"] = labels
    rows = [np.arange(i * q, (i + 1) * q) for i in range(len(ids))]
    index = feature_index(longer, model.config.image_token, rows)
    embeds = jax.jit(lambda *arrays: model.module.apply(model.variables, *arrays, method="embed"))
    outputs["inputs_embeds"] = embeds(longer, index, ran["image_hidden_states"])
    own = np.where(index < 0, -1, index - q * np.arange(len(ids))[:, None])
    columns = {"input_ids": np.maximum(longer, 0), "attention_mask": outputs["full_attention_mask"], "labels": labels}
    batch = {name: jnp.asarray(array) for name, array in (columns | {"feature_index": own}).items()}
    return outputs, batch | {"image": pixels[:, None]}


def generated(model: Blip2LanguageModel, pixels: Any, prompt: np.ndarray, meta: dict[str, Any]) -> dict[str, Any]:
    """transformers 4.33 puts </s> before ids that are generated from embeddings."""
    arrays = {"pixel_values": pixels, "input_ids": prompt, "attention_mask": np.ones_like(prompt)}
    inputs = model.prompt_inputs({name: jnp.asarray(array) for name, array in arrays.items()})
    del inputs["input_ids"]
    outputs: dict[str, Any] = {}
    recorded = meta["outputs"]
    maximum = re.search(r"max_length=(\d+)", recorded["greedy_ids"]["meaning"])
    for name in (name for name in recorded if name.endswith("_ids")):
        length, beams = recorded[name]["shape"][1], re.fullmatch(r"beam(\d+)_ids", name)
        options = model.options(
            num_beams=1 if beams is None else int(beams[1]),
            max_new_tokens=(length if maximum is None else int(maximum[1])) - 1,
            eos=(meta["config"]["eos_token_id"],),
            bos=model.config.bos,
            beam_rules=BeamRules.v4_33(),
        )
        new = np.asarray(generate(model.decodable(), model.variables, inputs, options).ids)[:, 0]
        rows = np.pad(new, ((0, 0), (1, 0)), constant_values=model.config.bos)
        outputs[name] = rows[:, :length]
    return outputs
