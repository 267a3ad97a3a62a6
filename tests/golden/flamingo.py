"""The Flamingo vaults: the resampler and a gated block by themselves, and whole OpenFlamingos."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.flamingo.checkpoint import CROSS, OPEN_FLAMINGO, _cross_entries, _resampler_entries
from mmjax.models.flamingo.config import FlamingoConfig, ResamplerConfig
from mmjax.models.flamingo.decode import FlamingoSteps
from mmjax.models.flamingo.network import CrossAttention, Flamingo
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.models.language.config import DecoderConfig
from mmjax.models.language.network import output_layer
from mmjax.models.vit.network import ViTConfig
from mmjax.nn.masks import images_before, media_mask
from mmjax.nn.resampler import Resampler
from mmjax.objectives.language import linear_cross_entropy, next_tokens
from mmjax.weights.table import Table, load_table, save_table


def check(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    inputs = {key.removeprefix("inputs/"): value for key, value in tensors.items() if key.startswith("inputs/")}
    inputs = {key: value.astype(np.int32) if value.dtype == np.int64 else value for key, value in inputs.items()}
    kind = meta["name"].removeprefix("flamingo_")
    if kind.startswith("perceiver"):
        return resampled(meta["config"], weights, inputs)
    if kind == "gated_xattn":
        return crossed(meta["config"], weights, inputs)
    lengths = {name: output["shape"][1] for name, output in meta["outputs"].items() if len(output["shape"]) > 1}
    return whole(meta["config"], weights, inputs, lengths)


def loaded(table: Table, weights: dict[str, Any], module: Any, *arrays: Any) -> Any:
    """Parameters of a module through a table, and back with the same bits."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *arrays)
    variables = load_table(table, weights, {"params": shapes["params"]}, "vault")
    for key, array in save_table(table, variables).items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key)
    return variables["params"]


# ------------------------------------------------------------------------------------------------------------ the parts


def resampled(config, weights, inputs):
    frames, media = config["max_num_frames"] or 0, config["max_num_media"] or 0
    sizes = (config["depth"], config["heads"], config["dim_head"], config["num_latents"])
    part = ResamplerConfig(*sizes, config["ff_mult"] * config["dim"], frames, media)
    module = Resampler(*sizes, config["ff_mult"] * config["dim"], frames, media)
    around = FlamingoConfig(
        ViTConfig(width=config["dim"]), DecoderConfig.mpt(8, 1, 1), part, image_token=1, end_of_chunk=0
    )

    def moved(entry):
        strip = lambda path: path.replace("params/resampler/", "params/")  # noqa: E731
        targets = tuple(map(strip, entry.targets))
        source = entry.sources[0].removeprefix("perceiver.")
        return type(entry)(source, targets if len(targets) > 1 else targets[0], entry.op)

    table = tuple(map(moved, _resampler_entries(around)))
    params = loaded(table, weights, module, inputs["x"])

    def loss(params, x):
        latents = module.apply({"params": params}, x)
        return (latents * inputs["cotangent"]).sum(), latents

    (_, latents), (grads, dx) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, inputs["x"])
    saved = save_table(table, {"params": jax.tree.map(np.asarray, grads)})
    return {"latents": latents, "grad/x": dx, **{f"grad/{key}": array for key, array in saved.items()}}


def crossed(config, weights, inputs):
    width, hidden = config["dim"], config["ff_mult"] * config["dim"]
    module = CrossAttention(width, config["heads"], config["dim_head"], hidden)
    table = tuple(_cross_entries("x"))
    table = tuple(
        type(entry)(
            entry.sources[0],
            tuple(path.replace("params/x/", "params/") for path in entry.targets)
            if len(entry.targets) > 1
            else entry.targets[0].replace("params/x/", "params/"),
            entry.op,
        )
        for entry in table
    )
    b, t, n, e = inputs["media"].shape
    media = jnp.asarray(inputs["media"].reshape(b, t * n, e))
    params = loaded(table, weights, module, inputs["x"], media)
    apply = jax.jit(lambda *arrays: module.apply(*arrays)[0])

    def masks(starts, earlier=0, only_last=True):
        mask = media_mask(starts, t, n, only_last, earlier)
        return (mask, images_before(starts, earlier) > 0) if only_last else (mask, None)

    starts = inputs["media_locations"]

    def loss(params, x):
        out = module.apply({"params": params}, x, media, *masks(starts))[0]
        return (out * inputs["cotangent"]).sum(), out

    (_, out), (grads, dx) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, inputs["x"])
    # tanh(gate) attention alone: the difference that the attention makes, without the feed-forward.
    alone = {**params, "mlp_gate": jnp.zeros(()), "gate": jnp.float32(np.arctanh(0.5))}
    attention = 2 * (apply({"params": alone}, inputs["x"], media, *masks(starts)) - inputs["x"])
    none = np.zeros((b, inputs["x_cached"].shape[1]), bool)
    variables, extra = {"params": params}, inputs["media_locations_extra"]
    outputs = {"out": out, "grad/x": dx, "attn_only": attention}
    outputs["out_cached"] = apply(variables, inputs["x_cached"], media, *masks(none, starts.sum(1)))
    outputs["out_no_locations"] = apply(variables, inputs["x"], media)
    outputs["out_all_previous"] = apply(variables, inputs["x"], media, *masks(starts, 0, False))
    outputs["out_more_tokens_than_images"] = apply(variables, inputs["x"], media, *masks(extra))
    saved = save_table(table, {"params": jax.tree.map(np.asarray, grads)})
    return outputs | {f"grad/{key}": array for key, array in saved.items()}


# ---------------------------------------------------------------------------------------------------------- the network


FAMILIES = {"neox": "gpt_neox"}


def config_json(recorded: dict[str, Any]) -> dict[str, Any]:
    kind = FAMILIES.get(recorded["lm"], recorded["lm"])
    return {
        "lang_config": {"model_type": kind, **recorded["lang_config"]},
        "vision_config": {"head_width": recorded["vis_dim"] // recorded["vis_heads"]},
        "quick_gelu": recorded["quick_gelu"],
        "cross_attn_every_n_layers": recorded["cross_attn_every_n_layers"],
        "perceiver": recorded["perceiver"],
        "xattn": recorded["xattn"],
        **{name: recorded[name] for name in ("media_token_id", "eoc_token_id", "pad_token_id")},
    }


def whole(recorded, weights, inputs, lengths):
    names = OPEN_FLAMINGO.unwrap(weights)
    assert OPEN_FLAMINGO.recognise(names.keys(), None)
    arrays = {name: weights[key] for name, key in names.items()}
    config = OPEN_FLAMINGO.config({name: array.shape for name, array in arrays.items()}, config_json(recorded))
    table = OPEN_FLAMINGO.table(config)
    variables = load_table(table, arrays, FlamingoModel.shapes(config), "vault")
    for key, array in save_table(table, variables).items():
        np.testing.assert_array_equal(array, arrays[key], err_msg=key)
    model = FlamingoModel(config, jax.tree.map(jnp.asarray, variables["params"]))
    images = np.moveaxis(inputs["vision_x"], 3, -1)  # [b, t, f, h, w, 3]
    frames = jnp.asarray(images.reshape(-1, *images.shape[3:]))
    apply = model.module.apply
    outputs = {
        "vision_tokens": apply(model.variables, frames, method="tokens"),
        "vision_pooled": apply(model.variables, frames, method="image_features"),
    }
    ran = model.forward(images, inputs["lang_x"], inputs["attention_mask"])
    outputs |= {"latents": ran["image_hidden_states"], "logits": ran["logits"]}
    labels = next_tokens(jnp.asarray(inputs["labels"]))

    def loss(params):
        media = apply({"params": params}, images, method="encode_media")
        texts = (jnp.asarray(inputs["lang_x"]), jnp.asarray(inputs["attention_mask"]))
        hidden = apply({"params": params}, media, *texts, method="hidden")
        return linear_cross_entropy(
            hidden, labels=labels, **output_layer(params["language"], config.decoder)
        ).loss.value

    outputs["loss"], grads = jax.jit(jax.value_and_grad(loss))(model.params)
    saved = save_table(table, {"params": jax.tree.map(np.asarray, grads)})
    for key, array in saved.items():
        outputs[f"grad/{key}"] = array
        match = CROSS.match(key)
        if match:
            outputs[f"grad/lang_encoder.gated_cross_attn_layers.{match[1]}.{key[match.end() :]}"] = array
    return outputs | generated(model, images, inputs, lengths)


def generated(model, images, inputs, lengths):
    prompt, mask = inputs["gen_x"], inputs["gen_mask"]

    def ids(name, **options):
        """Prompt and new ids, in the recorded length: the library leaves out what is padding in every row."""
        new = model.generate(prompt, pixel_values=images, attention_mask=mask, max_new_tokens=7, **options)
        rows = np.concatenate([prompt, new], axis=1)
        return np.pad(rows, ((0, 0), (0, max(lengths[name] - rows.shape[1], 0))), constant_values=model.pad)

    greedy = ids("greedy_ids")
    outputs = {"greedy_ids": greedy, "beam3_ids": ids("beam3_ids", num_beams=3)}
    outputs["greedy_eos_ids"] = ids("greedy_eos_ids", eos=(int(inputs["alt_eos_token_id"]),))
    # Each step's logits on the way of the greedy ids.
    steps = FlamingoSteps(model.config)
    media = model.module.apply(model.variables, images, method="encode_media")
    texts = {"input_ids": jnp.asarray(prompt), "attention_mask": jnp.asarray(mask), "media": media}
    logits, state = steps.prefill(model.variables, texts, 1, 7)
    scores = [logits]
    for i in range(lengths["greedy_scores"] - 1):
        logits, state = steps.step(model.variables, jnp.asarray(greedy[:, prompt.shape[1] + i, None]), state)
        scores.append(logits[:, 0])
    outputs["greedy_scores"] = np.stack(scores, axis=1)
    earlier = (prompt == model.config.image_token).sum(1)

    def after_cached_media(module, media, ids):
        return module.language(ids, before=module.before(media, ids, jnp.asarray(earlier)))["logits"]

    cached = Flamingo(model.config).apply(model.variables, media, inputs["cache_suffix"], method=after_cached_media)
    return outputs | {"cached_logits": cached}
