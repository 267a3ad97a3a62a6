"""LLaVAs whose files lack a part: checkpoints without the tower (v1, v1.5), projectors alone, LoRA folders.

clip = mmjax.load("openai/clip-vit-large-patch14-336")
vlm = load_parts("llava-v1.5-7b", clip)                                   # language model and projector
vlm = load_parts("pretrain/mm_projector.bin", clip, mmjax.load("vicuna")) # a projector alone
vlm = load_parts("lora/non_lora_trainables.bin", clip, mmjax.load("vicuna"))
vlm = mmjax.adapters.load_lora(vlm, "lora", layout="llava")               # what was trained beside adapters
"""

import pathlib
import re
from typing import Any

import jax.numpy as jnp

from mmjax.errors import MmjaxError
from mmjax.interface.model import Model
from mmjax.models.llava.checkpoint import IGNORED, connector_of, original_config_beside, original_table
from mmjax.models.llava.tasks import LlavaModel
from mmjax.weights.files import parse_json, read_weights
from mmjax.weights.source import Source, find_weight_file
from mmjax.weights.table import load_table

PROJECTOR = re.compile(r"^.*?(mm_projector\.|image_newline$)")
"""The beginning of a projector's key: model., base_model.model.model., or nothing."""


def load_parts(source: Source, vision: Model, language: Model | None = None) -> LlavaModel:
    """The model of a file of the original's layout that lacks the tower, or the language model too.

    source: a weight file, or a folder with one; its config.json is read beside it.
    vision: a loaded CLIP or ViT. language: a loaded language model, for a projector alone.
    Raises MmjaxError listing the keys that are missing and those that belong to no part.
    """
    file = find_weight_file(pathlib.Path(source))
    weights, beside = read_weights(file), file.with_name("config.json")
    fields = parse_json(beside.read_bytes(), beside) if beside.is_file() else {}
    names = {PROJECTOR.sub(r"model.\1", key): key for key in weights.arrays}
    tower = getattr(vision.config, "tower", vision.config)
    decoder = None if language is None else language.config
    if decoder is None and not fields:
        raise MmjaxError(f"{file}: without a config.json beside it, pass the language model: load_parts(.., language=)")
    config = original_config_beside(fields, tower, connector_of(fields, names), decoder)
    parts = ("connector", "newline") if language is not None else ("connector", "newline", "language")
    params: dict[str, Any] = LlavaModel.shapes(config)["params"]
    shapes = {"params": {part: params[part] for part in parts if part in params}}
    table = tuple(entry for entry in original_table(config) if entry.targets[0].split("/")[1] in parts)
    arrays = {name: weights.arrays[key] for name, key in names.items()}
    loaded = load_table(table, arrays, shapes, str(file), IGNORED)["params"]
    loaded = {part: _on_device(tree) for part, tree in loaded.items()}
    loaded["vision"] = vision.params.get("vision", vision.params)
    tokenizer = LlavaModel.load_tokenizer(file.with_name("tokenizer.json")) if language is None else language.tokenizer
    if language is not None:
        loaded["language"] = language.params
    model = LlavaModel(config, loaded, tokenizer=tokenizer, layout="llava")
    return model.replace(preprocess=LlavaModel.default_preprocess(config, "llava"))


def _on_device(tree: Any) -> Any:
    return {key: _on_device(leaf) for key, leaf in tree.items()} if isinstance(tree, dict) else jnp.asarray(tree)
