"""The LLaVA vaults: features, spliced prompts, logits, loss, gradients and ids; any resolution; texts and labels."""

import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.tiles import best_grid
from mmjax.generation.options import BeamRules
from mmjax.models.llava.checkpoint import ORIGINAL
from mmjax.models.llava.tasks import LlavaModel
from mmjax.models.llava.templates import PLACEHOLDER, TEMPLATES
from mmjax.models.vision_language.network import VisionLanguage
from mmjax.models.vision_language.pretrain import PrefixLM
from mmjax.objectives.language import linear_cross_entropy, next_tokens
from mmjax.text.batches import padded
from mmjax.text.image_prompts import encode_with_images, expand, feature_index
from mmjax.text.packing import IGNORED
from mmjax.text.tokenizer import Tokenizer
from mmjax.training.state import Carry
from mmjax.weights.table import load_table, save_table


def check(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    inputs = {key.removeprefix("inputs/"): value for key, value in tensors.items() if key.startswith("inputs/")}
    if meta["name"] == "llava_text":
        return texts(meta, inputs)
    model, table = load(meta, tensors)
    return (any_resolution if "image_sizes" in inputs else fixed_size)(model, inputs, table)


def load(meta: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[LlavaModel, Any]:
    """As the library does it, and the way back; a config.json of the original has no vision_config."""
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    fields = meta["config"] | {"model_type": "llava_llama", "vision_config": meta["config"]["clip"]}
    names = ORIGINAL.unwrap(weights)
    assert ORIGINAL.recognise(names.keys(), fields)
    arrays = {name: weights[key] for name, key in names.items()}
    config = ORIGINAL.config({name: array.shape for name, array in arrays.items()}, fields)
    table = ORIGINAL.table(config)
    variables = load_table(table, arrays, LlavaModel.shapes(config), meta["name"])
    saved = save_table(table, variables)
    assert saved.keys() == arrays.keys()
    for key, array in saved.items():
        np.testing.assert_array_equal(array, arrays[key], err_msg=key)
    return LlavaModel(config, jax.tree.map(jnp.asarray, variables["params"])), table


# ------------------------------------------------------------------------------------------------- images of one size


def fixed_size(model: LlavaModel, inputs: dict[str, np.ndarray], table: Any) -> dict[str, Any]:
    c, pixels = model.config, jnp.asarray(np.moveaxis(inputs["images"], 1, -1))
    network = VisionLanguage(c)
    tower = jax.jit(lambda params, x: network.apply({"params": params}, x, method=lambda m, x: m.vision(x)))
    outputs: dict[str, Any] = {"clip_features": tower(model.params, pixels)}
    features = model.forward(pixels[:1], expanded(model, [[PLACEHOLDER]], None)[0])["image_hidden_states"]
    outputs["image_features"] = np.concatenate([np.asarray(features), np.asarray(encode(model, pixels))[1:]])
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    for name, side, limit in (("", "right", None), ("trunc_", "right", ids.shape[1] + 3), ("left_", "left", None)):
        batch = prepared(model, ids, mask, labels, side, limit)
        embeds = embed(model, model.params, pixels, batch)
        mine = {"labels": batch["labels"], "attention_mask": batch["mask"]}
        if name:
            outputs |= {f"{name}embeds": embeds} | {f"{name}{key}": value for key, value in mine.items()}
        else:
            outputs |= {"inputs_embeds": embeds} | {f"new_{key}": value for key, value in mine.items()}
            positions = np.arange(batch["mask"].shape[1]) * batch["mask"]
            outputs["position_ids"] = positions
    del outputs["trunc_attention_mask"]
    batch = prepared(model, ids, mask, labels)
    outputs |= trained(model, pixels, batch, table)
    np.testing.assert_allclose(loss_of_rows(model, pixels, batch), outputs["loss"], rtol=1e-5)
    return outputs | generated(model, inputs, pixels)


def prepared(
    model: LlavaModel, ids: Any, mask: Any, labels: Any, side: Any = "right", limit: int | None = None
) -> dict[str, np.ndarray]:
    """Ids, labels and index of the spliced rows; a row without an image consumes one, too (llava_arch.py:235)."""
    n = model.config.tile_tokens
    rows, row_labels, image_rows, cursor = [], [], [], 0
    for each, valid, label in zip(ids, mask.astype(bool), labels):
        count = int((each[valid] == PLACEHOLDER).sum())
        row, spliced = each[valid].tolist(), []
        for id, one in zip(row, label[valid].tolist()):
            spliced += [IGNORED] * n if id == PLACEHOLDER else [one]
        rows.append(expand(row, PLACEHOLDER, [n] * count)[:limit])
        row_labels.append(spliced[:limit])
        mine = [np.arange(i * n, (i + 1) * n) for i in range(cursor, cursor + count)]
        image_rows.append(np.concatenate([*mine, np.zeros(0, int)])[: rows[-1].count(PLACEHOLDER)])
        cursor += max(count, 1)
    width = max(map(len, rows))
    new_ids, new_mask = padded(rows, width, 0, side)
    return {
        "ids": new_ids,
        "mask": new_mask,
        "labels": padded(row_labels, width, IGNORED, side)[0],
        "index": feature_index(new_ids, PLACEHOLDER, image_rows),
    }


def expanded(model: LlavaModel, ids: Any, mask: Any, side: Any = "left") -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(ids)
    mask = np.ones_like(ids) if mask is None else mask
    batch = prepared(model, ids, mask, np.zeros_like(ids), side)
    return batch["ids"], batch["mask"]


def encode(model: LlavaModel, pixels: Any) -> Any:
    return jax.jit(lambda params, x: VisionLanguage(model.config).apply({"params": params}, x, method="encode_image"))(
        model.params, pixels
    )


def embed(model: LlavaModel, params: Any, pixels: Any, batch: dict[str, np.ndarray]) -> Any:
    """The original's padding is zeros."""
    network, variables = VisionLanguage(model.config), {"params": params}

    def run(variables: Any, pixels: Any) -> Any:
        features = network.apply(variables, pixels, method="encode_image")
        embeds: Any = network.apply(variables, batch["ids"], batch["index"], features, method="embed")
        return embeds * batch["mask"][..., None]

    return jax.jit(run)(variables, pixels)


def loss_of_rows(model: LlavaModel, pixels: Any, batch: dict[str, np.ndarray]) -> Any:
    """As `PrefixLM` has it: each row with all images, and their features numbered within the row."""
    method, names = PrefixLM(model.config), {"input_ids": "ids", "attention_mask": "mask", "labels": "labels"}
    rows = {name: jnp.asarray(batch[key]) for name, key in names.items()} | {
        "feature_index": jnp.asarray(batch["index"])
    }
    rows["image"] = jnp.broadcast_to(pixels, (len(batch["ids"]), *pixels.shape))
    return jax.jit(lambda params, rows: method.loss(params, Carry(), rows, jax.random.key(0), jnp.int32(0))[0].value)(
        model.params, rows
    )


def trained(model: LlavaModel, pixels: Any, batch: dict[str, np.ndarray], table: Any) -> dict[str, Any]:
    network = VisionLanguage(model.config)

    def loss(params: Any) -> Any:
        variables = {"params": {**params, "vision": jax.lax.stop_gradient(params["vision"])}}
        embeds = embed(model, variables["params"], pixels, batch)
        outputs: Any = network.apply(variables, embeds, batch["mask"], method="decode")
        kernel = params["language"]["head"]["kernel"]
        value = linear_cross_entropy(outputs["states"][-1], kernel, labels=next_tokens(jnp.asarray(batch["labels"])))
        return value.loss.value, outputs["logits"]

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    saved = save_table(table, {"params": jax.tree.map(np.asarray, grads)})
    return {"loss": value, "logits": logits} | {f"grad/{key}": array for key, array in saved.items()}


def generated(model: LlavaModel, inputs: dict[str, np.ndarray], pixels: Any) -> dict[str, Any]:
    """transformers 4.37 puts a BOS before the ids of a prompt of embeddings."""
    outputs: dict[str, Any] = {}

    def with_bos(ids: Any) -> np.ndarray:
        return np.pad(np.asarray(ids), ((0, 0), (1, 0)), constant_values=model.config.bos or 1)

    options: dict[str, Any] = {"max_new_tokens": 8, "bos": model.config.bos, "beam_rules": BeamRules.v4_37()}
    ids, mask = expanded(model, inputs["gen_ids"], None)
    outputs["greedy_ids"] = with_bos(model.generate(ids, pixel_values=pixels[:1], attention_mask=mask, **options))
    beams = model.generate(ids, pixel_values=pixels[:1], attention_mask=mask, num_beams=3, **options)
    outputs["beam3_ids"] = with_bos(beams)
    ids, mask = expanded(model, inputs["gen_batch_ids"], inputs["gen_batch_mask"])
    rows = model.generate(ids, pixel_values=pixels[:2], attention_mask=mask, **options)
    outputs["batch_greedy_ids"] = with_bos(rows)
    # The scores of each step are those of a pass over the prompt and the ids before it.
    whole = np.concatenate([expanded(model, inputs["gen_ids"], None)[0], outputs["greedy_ids"][:, 1:-1]], 1)
    logits = np.asarray(model.forward(pixels[:1], whole)["logits"])
    outputs["greedy_scores"] = logits[:, -outputs["greedy_ids"].shape[1] + 1 :]
    return outputs


# ------------------------------------------------------------------------------------------------------ any resolution


def any_resolution(model: LlavaModel, inputs: dict[str, np.ndarray], table: Any) -> dict[str, Any]:
    sizes = inputs["image_sizes"][:, ::-1]  # height, width
    images = [np.moveaxis(inputs[f"images.{i}"], 1, -1) for i in range(len(sizes))]
    most = max(map(len, images))
    pixels = jnp.asarray(np.stack([np.pad(x, ((0, most - len(x)), *[(0, 0)] * 3)) for x in images]))
    visual = {"pixel_values": pixels, "image_sizes": jnp.asarray(sizes)}
    lengths = [len(rows) for rows in model.pictures(visual)[1]]
    rows, cursor = [], 0
    for row in inputs["input_ids"].tolist():
        count = row.count(PLACEHOLDER)
        rows.append(expand(row, PLACEHOLDER, lengths[cursor : cursor + count]))
        cursor += count
    ids, mask = padded(rows, max(map(len, rows)), 0, "right")
    # The same, as tiles one after the other.
    flat = {**visual, "pixel_values": jnp.asarray(np.concatenate(images))}
    pixels, image_rows = model.pictures(flat)
    for padded_rows, flat_rows in zip(model.pictures(visual)[1], image_rows):
        np.testing.assert_array_equal(padded_rows, flat_rows)
    batch = {"ids": ids, "mask": mask, "index": feature_index(ids, PLACEHOLDER, image_rows)}
    embeds = embed(model, model.params, pixels, batch)
    network = VisionLanguage(model.config)
    decode = jax.jit(lambda variables, *arrays: network.apply(variables, *arrays, method="decode"))
    outputs: Any = decode(model.variables, embeds, mask)
    forwarded = model.forward(**visual, input_ids=ids, attention_mask=mask)["logits"]
    np.testing.assert_allclose(forwarded[mask == 1], outputs["logits"][mask == 1], atol=1e-5)
    side, grids = model.config.vision.image_size[0], model.config.grids
    grid = [best_grid((int(height), int(width)), grids, side)[::-1] for height, width in sizes]
    return {"grid": np.asarray(grid), "inputs_embeds": embeds, "attention_mask": mask, "logits": outputs["logits"]}


# --------------------------------------------------------------------------------------------------------------- texts


def texts(meta: dict[str, Any], inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    turns = [turn["value"] for turn in meta["config"]["source"]]
    for name, recorded in meta["text"]["templates"].items():
        check_prompts(name, recorded, turns)
    outputs: dict[str, Any] = {}
    for kind, legacy in (("legacy", True), ("new", False)):
        tokenizer = tokenizer_of(inputs["sentencepiece_model"], legacy)
        for name in ("v1", "v0", "llava_llama_2", "plain"):
            example = TEMPLATES[name].example(tokenizer, turns[: 2 if name == "plain" else None], has_image=True)
            outputs |= {f"ids/{name}.{kind}": example.ids, f"labels/{name}.{kind}": example.labels}
        text = meta["text"]["templates"]["v1"]["inference"]
        outputs[f"ids/inference_v1.{kind}"] = np.asarray(encode_with_images(tokenizer, text, PLACEHOLDER))
    return outputs


def tokenizer_of(model: np.ndarray, legacy: bool) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "tokenizer.model"
        file.write_bytes(model.tobytes())
        file.with_name("tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        return Tokenizer.from_sentencepiece(file)


def check_prompts(name: str, recorded: dict[str, Any], turns: list[str]) -> None:
    template = TEMPLATES[name]
    fields = {key: recorded[key] for key in ("system", "sep", "sep2", "version")}
    assert {key: getattr(template, key) for key in fields} == fields and list(template.roles) == recorded["roles"]
    if "training" in recorded:
        assert template.prompt(turns) == recorded["training"], name
        assert template.prompt([*turns[:-1], None]) == recorded["inference"], name
    if "training_with_template_messages" in recorded:
        assert template.prompt(turns, examples=True) == recorded["training_with_template_messages"], name
    assert template.prompt(template.with_image([turns[0], None])) == recorded["inference_image_tuple"], name
