"""LLaVA's public forms: haotian-liu/LLaVA's, and Hugging Face's in its four spellings of the keys."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.clip.checkpoint import ACTIVATIONS, hf_tower_config, hf_tower_fields, hf_tower_table
from mmjax.models.language import checkpoint as language
from mmjax.models.language.config import DecoderConfig
from mmjax.models.vision_language.network import Connector, IdentityConnector, MlpConnector, VisionLanguageConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Shape, Table, linear

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
DEFAULT_GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""image_grid_pinpoints where config.json leaves them out."""


def _parts(config: VisionLanguageConfig, tower: str, decoder: str) -> list[Entry]:
    """The entries of the tower and the language model, under these prefixes."""
    vision = [
        dataclasses.replace(entry, source=f"{tower}{entry.sources[0]}") for entry in hf_tower_table(config.vision)
    ]
    return vision + [moved(entry, decoder, "language") for entry in language.HF.table(config.language)]


def _layer(source: str, i: int, use_bias: bool) -> list[Entry]:
    kernel = Entry(f"{source}.weight", f"params/connector/layer_{i}/kernel", linear)
    return [kernel] + ([Entry(f"{source}.bias", f"params/connector/layer_{i}/bias")] if use_bias else [])


def _vision(shapes: Shapes, prefix: str, fields: Mapping[str, Any], heads: int | None) -> ViTConfig:
    """heads: where config.json does not determine them; None: each is 64 wide."""
    kind = fields.get("model_type", "clip_vision_model")
    act = fields.get("hidden_act", "quick_gelu")
    if kind not in ("clip_vision_model", "clip") or act not in ACTIVATIONS:
        raise MmjaxError(
            f"config.json: vision_config has model_type {kind!r}, hidden_act {act!r}: CLIP's towers are read"
        )
    tower = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    width = tower["vision_model.embeddings.patch_embedding.weight"][0]
    number = int(fields.get("num_attention_heads", heads or max(width // 64, 1)))
    return hf_tower_config(tower, number, act=ACTIVATIONS[act], epsilon=fields.get("layer_norm_eps", 1e-5))


def _grids(pinpoints: Sequence[Sequence[int]], side: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of (height, width) in pixels."""
    if any(length % side for pinpoint in pinpoints for length in pinpoint):
        raise MmjaxError(f"image_grid_pinpoints: {list(pinpoints)} are not whole tiles of {side} x {side}")
    return tuple((height // side, width // side) for height, width in pinpoints)


# -------------------------------------------------------------------------------------------------------- the original

TOWER = "model.vision_tower.vision_tower."
NAMES = {
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "v1": "vicuna_v1",
    "mpt": "mpt",
}
"""Part of a model's name -> its template; the first that fits (serve/cli.py). Evaluations use vicuna_v1."""


def original_table(config: VisionLanguageConfig) -> Table:
    connector, entries = config.connector, _parts(config, TOWER, "")
    if isinstance(connector, MlpConnector):
        if connector.act != "gelu" or not connector.use_bias:
            raise MmjaxError("layout='llava': the original's projectors have biases and an erf GELU")
        for i in range(connector.depth):
            name = "model.mm_projector" if connector.depth == 1 else f"model.mm_projector.{2 * i}"
            entries += _layer(name, i, True)
    return (*entries, *([Entry("model.image_newline", "params/newline")] if config.newline else []))


def original_config(shapes: Shapes, config_json: ConfigJson) -> VisionLanguageConfig:
    """From config.json; the sizes of the tower from its arrays.

    Raises MmjaxError for weights without a tower, which takes a file of CLIP beside them.
    """
    fields = dict(config_json or {})
    if not any(key.startswith(TOWER) for key in shapes):
        tower = fields.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
        raise MmjaxError(
            f"these weights lack the vision tower ({tower}): load it and the folder by "
            "mmjax.models.llava.parts.load_parts"
        )
    vision = _vision(shapes, TOWER, fields.get("vision_config") or {}, None)
    return original_config_beside(fields, vision, connector_of(fields, shapes))


def original_config_beside(
    fields: Mapping[str, Any], vision: ViTConfig, connector: Connector, decoder: DecoderConfig | None = None
) -> VisionLanguageConfig:
    """fields: of config.json. decoder: None: the config.json is the decoder's too."""
    kind = str(fields.get("model_type", "llava"))
    family = next((name for name in ("mistral", "mpt") if name in kind), "llama")
    if decoder is None:
        decoder = language.config_of({}, {**fields, "model_type": family})
    select = fields.get("mm_vision_select_feature", "patch")
    if select not in ("patch", "cls_patch"):
        raise MmjaxError(f"config.json: mm_vision_select_feature {select!r}: patch or cls_patch")
    aspect, side = fields.get("image_aspect_ratio"), vision.image_size[0]
    grids: tuple[tuple[int, int], ...] = ()
    if aspect == "anyres":
        pinpoints = fields.get("image_grid_pinpoints", DEFAULT_GRIDS)  # widths and heights here
        grids = _grids([(height, width) for width, height in pinpoints], side)
    name = str(fields.get("_name_or_path", "")).lower()
    templates = {"mistral": "mistral_instruct", "mpt": "mpt"}
    return VisionLanguageConfig(
        vision,
        decoder,
        connector,
        layer=fields.get("mm_vision_select_layer", -2),
        class_token=select == "cls_patch",
        grids=grids,
        merge=fields.get("mm_patch_merge_type", "flat"),
        template=next((NAMES[part] for part in NAMES if part in name), templates.get(family, "vicuna_v1")),
        pad_images=aspect == "pad",
    )


def connector_of(fields: Mapping[str, Any], keys: Iterable[str]) -> Connector:
    """multimodal_projector/builder.py: linear, mlp2x_gelu, ..., identity; else by the keys of a projector."""
    kind = fields.get("mm_projector_type")
    if kind is None:
        layers = {match[1] for match in (re.search(r"mm_projector\.(\d+)\.weight$", key) for key in keys) if match}
        return MlpConnector(max(len(layers), 1))
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind not in ("linear", "identity") and match is None:
        raise MmjaxError(f"config.json: mm_projector_type {kind!r}: linear, mlp2x_gelu (3x, ...) or identity")
    return IdentityConnector() if kind == "identity" else MlpConnector(int(match[1]) if match else 1)


def _decoder(config: VisionLanguageConfig) -> DecoderConfig:
    """The language model. Raises MmjaxError for an encoder-decoder, which no layout of LLaVA holds."""
    if not isinstance(config.language, DecoderConfig):
        raise MmjaxError("LLaVA's layouts hold a decoder, not an encoder-decoder")
    return config.language


def original_hf_config(config: VisionLanguageConfig) -> dict[str, Any]:
    """The original's config.json, with the sizes of the tower, which it has by name alone."""
    fields, connector, side = language.hf_config(_decoder(config)), config.connector, config.vision.image_size[0]
    if isinstance(config.layer, tuple) or config.layer is None:
        raise MmjaxError(f"layout='llava': the original takes one layer of the tower, not {config.layer}")
    kind = {"mistral": "llava_mistral", "mpt": "llava_mpt"}.get(fields["model_type"], "llava_llama")
    names = {"llava_llama": "LlavaLlamaForCausalLM", "llava_mistral": "LlavaMistralForCausalLM"}
    fields |= {"architectures": [names.get(kind, "LlavaMptForCausalLM")], "model_type": kind}
    depth = connector.depth if isinstance(connector, MlpConnector) else 0
    fields |= {
        "mm_vision_tower": f"openai/clip-vit-large-patch14{'-336' if side == 336 else ''}",
        "mm_hidden_size": config.feature_width,
        "mm_projector_type": ("identity", "linear")[depth] if depth < 2 else f"mlp{depth}x_gelu",
        "mm_vision_select_layer": config.layer,
        "mm_vision_select_feature": "cls_patch" if config.class_token else "patch",
        "mm_patch_merge_type": config.merge,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if config.grids else "pad" if config.pad_images else "square",
        "vision_config": hf_tower_fields(config.vision, 768) | {"layer_norm_eps": config.vision.epsilon},
    }
    if config.grids:
        fields["image_grid_pinpoints"] = [[columns * side, rows * side] for rows, columns in config.grids]
    return fields


def _is_original(keys: Set[str], config_json: ConfigJson) -> bool:
    tower = any(key.startswith(TOWER) for key in keys)
    return "model.embed_tokens.weight" in keys and (tower or any(key.startswith("model.mm_projector") for key in keys))


# -------------------------------------------------------------------------------------------------------- Hugging Face

HF_TOWER = "vision_tower."
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def hf_table(config: VisionLanguageConfig) -> Table:
    """The keys of the files on the hub, which every version of transformers reads."""
    connector = config.connector
    if not isinstance(connector, MlpConnector) or connector.depth != 2:
        raise MmjaxError("layout='hf': LlavaForConditionalGeneration has a connector of two layers; layout='llava'")
    if config.newline != bool(config.grids) or (config.merge == "spatial"):
        raise MmjaxError(f"layout='hf': merge={config.merge!r} with grids={config.grids} is neither of its two classes")
    if config.image_token < 0:
        raise MmjaxError("layout='hf': its images are an id of the vocabulary: export model.with_image_id()")
    entries = _parts(config, HF_TOWER, "language_model.")
    for i in (0, 1):
        entries += _layer(f"multi_modal_projector.linear_{i + 1}", i, connector.use_bias)
    return (*entries, *([Entry("image_newline", "params/newline")] if config.newline else []))


def hf_config_of(shapes: Shapes, config_json: ConfigJson) -> VisionLanguageConfig:
    """From config.json; fields that it leaves out have the defaults of transformers' classes."""
    if config_json is None:
        raise MmjaxError("a config.json has to lie beside the weights: heads and layers are in none of them")
    vision, text = (dict(config_json.get(f"{name}_config") or {}) for name in ("vision", "text"))
    connector = MlpConnector(
        2,
        language.ACTIVATIONS[config_json.get("projector_hidden_act", "gelu")],  # type: ignore[arg-type]
        "multi_modal_projector.linear_1.bias" in shapes,
    )
    tower, tiled = _vision(shapes, HF_TOWER, vision, 16), "image_newline" in shapes
    side = tower.image_size[0]
    layer = config_json.get("vision_feature_layer", -2)
    token = config_json.get("image_token_index", config_json.get("image_token_id", 32_000))
    tied = config_json.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    special = {name: config_json[name] for name in SPECIAL if config_json.get(name) is not None}
    decoder = language.config_of({}, {"model_type": "llama", **special, **text, "tie_word_embeddings": tied})
    pinpoints = config_json.get("image_grid_pinpoints") or DEFAULT_GRIDS
    return VisionLanguageConfig(
        tower,
        decoder,
        connector,
        layer=tuple(layer) if isinstance(layer, list) else layer,
        class_token=config_json.get("vision_feature_select_strategy", "default") == "full",
        grids=_grids(pinpoints, side) if tiled else (),
        merge="spatial_unpad" if tiled else "flat",
        image_token=token,
    )


def hf_config(config: VisionLanguageConfig) -> dict[str, Any]:
    """config.json of a LlavaForConditionalGeneration or, with tiles, of a LlavaNextForConditionalGeneration."""
    connector = config.connector
    assert isinstance(connector, MlpConnector)
    acts = {ours: public for public, ours in reversed(language.ACTIVATIONS.items())}
    side, name = config.vision.image_size[0], "LlavaNext" if config.grids else "Llava"
    fields: dict[str, Any] = {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": "llava_next" if config.grids else "llava",
        "image_token_index": config.image_token,
        "image_seq_length": config.tile_tokens,
        "projector_hidden_act": acts[connector.act],
        "multimodal_projector_bias": connector.use_bias,
        "vision_feature_layer": list(config.layer) if isinstance(config.layer, tuple) else config.layer,
        "vision_feature_select_strategy": "full" if config.class_token else "default",
        "tie_word_embeddings": config.language.tied,
        "vision_config": hf_tower_fields(config.vision, 768) | {"layer_norm_eps": config.vision.epsilon},
        "text_config": language.hf_config(_decoder(config)),
    }
    if config.grids:
        fields["image_grid_pinpoints"] = [[rows * side, columns * side] for rows, columns in config.grids]
    return fields


def _is_hf(keys: Set[str], config_json: ConfigJson) -> bool:
    return any(key.startswith(HF_TOWER) for key in keys) and "multi_modal_projector.linear_1.weight" in keys


# ------------------------------------------------------------------------------------------------------------- layouts

IGNORED = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids", "*vision_resampler*")
ORIGINAL = Layout(
    name="llava",
    recognise=_is_original,
    config=original_config,
    table=original_table,
    hf_config=original_hf_config,
    ignored=IGNORED,
    assumed={"vision.heads": "vision_config.num_attention_heads", "template": "_name_or_path"},
)
HF = Layout(
    name="hf",
    recognise=_is_hf,
    config=hf_config_of,
    table=hf_table,
    hf_config=hf_config,
    renames=(
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(multi_modal_projector|vision_tower|image_newline)", r"\1"),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
    ignored=IGNORED,
)
LAYOUTS: tuple[Layout, ...] = (ORIGINAL, HF)
