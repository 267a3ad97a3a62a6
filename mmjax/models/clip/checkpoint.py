"""CLIP's public forms: OpenAI's, open_clip's two, Hugging Face's. One table each, read in both directions.

The head counts are in no file of weights: OpenAI's heads are 64 wide, other widths (open_clip's H, g, bigG) come
from the config beside the weights, or from the published sizes where there is none.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Set
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.table import Entry, Layout, Op, Shape, Table, chain, conv, int64, linear, reshape, split

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
WIDE_HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Heads by width of open_clip's H, g and bigG vision towers, where no config lists them."""
Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None


def _dense(source: str, target: str, op: Op = linear) -> list[Entry]:
    return [Entry(f"{source}.weight", f"params/{target}/kernel", op), Entry(f"{source}.bias", f"params/{target}/bias")]


def _norm(source: str, target: str) -> list[Entry]:
    return [Entry(f"{source}.weight", f"params/{target}/scale"), Entry(f"{source}.bias", f"params/{target}/bias")]


def _tower(vision: ViTConfig, source: str, names: tuple[str, ...]) -> list[Entry]:
    """The entries around the ViT's blocks. names: keys of class token, positions, patches, first, last norm."""
    tokens, positions, patches, before, after = (f"{source}.{name}" for name in names)
    kernel = chain(conv, reshape((vision.patch, vision.patch, 3, vision.width)))
    rows = vision.grid[0] * vision.grid[1] + 1
    return [
        Entry(tokens, "params/vision/cls", reshape((vision.width,))),
        Entry(positions, "params/vision/positions", reshape((rows, vision.width))),
        Entry(patches, "params/vision/patch/projection/kernel", kernel),
        *_norm(before, "vision/norm_before"),
        *_norm(after, "vision/norm"),
    ]


def _scalars(config: CLIPConfig) -> list[Entry]:
    """Some files have shape [1], others []."""
    names = ["logit_scale"] + (["logit_bias"] if config.init_bias is not None else [])
    return [Entry(name, f"params/{name}", SCALAR) for name in names]


SCALAR = Op("scalar", lambda x: x.reshape(()), lambda x: x)


# ------------------------------------------------------------------------------------------------ OpenAI and open_clip


def openai_table(config: CLIPConfig, text: str = "") -> Table:
    """Keys of openai/CLIP; text: the prefix of the text tower's keys in open_clip's CustomTextCLIP."""
    if config.act not in ("quick_gelu", "gelu"):
        raise MmjaxError(f"act={config.act!r}: OpenAI's and open_clip's CLIP know quick_gelu and gelu")
    entries = _scalars(config)
    entries += [
        Entry(f"{text}token_embedding.weight", "params/text/token_embedding"),
        Entry(f"{text}positional_embedding", "params/text/positions"),
        Entry(f"{text}text_projection", "params/text/projection/kernel"),
        *_norm(f"{text}ln_final", "text/norm"),
    ]
    for i in range(config.text.depth):
        entries += openai_block(f"{text}transformer.resblocks.{i}", f"text/encoder/block_{i}")
    vision = config.vision
    if isinstance(vision, ResNetConfig):
        return tuple(entries + _resnet(vision))
    around = ("class_embedding", "positional_embedding", "conv1.weight", "ln_pre", "ln_post")
    entries += _tower(vision, "visual", around)
    entries.append(Entry("visual.proj", "params/vision_projection/kernel"))
    for i in range(vision.depth):
        entries += openai_block(f"visual.transformer.resblocks.{i}", f"vision/encoder/block_{i}")
    return tuple(entries)


def openai_block(source: str, target: str) -> list[Entry]:
    kernels, biases = (tuple(f"params/{target}/attention/{x}/{y}" for x in "qkv") for y in ("kernel", "bias"))
    return [
        *_norm(f"{source}.ln_1", f"{target}/norm_1"),
        Entry(f"{source}.attn.in_proj_weight", kernels, chain(split(3), linear)),
        Entry(f"{source}.attn.in_proj_bias", biases, split(3)),
        *_dense(f"{source}.attn.out_proj", f"{target}/attention/out"),
        *_norm(f"{source}.ln_2", f"{target}/norm_2"),
        *_dense(f"{source}.mlp.c_fc", f"{target}/mlp/up"),
        *_dense(f"{source}.mlp.c_proj", f"{target}/mlp/down"),
    ]


def _batch_norm(source: str, target: str) -> list[Entry]:
    return [
        *_norm(source, target),
        Entry(f"{source}.running_mean", f"stats/{target}/mean"),
        Entry(f"{source}.running_var", f"stats/{target}/var"),
        Entry(f"{source}.num_batches_tracked", f"stats/{target}/count", int64, optional=True, default=0),
    ]


def _resnet(vision: ResNetConfig) -> list[Entry]:
    if vision.attention_pool is None:
        raise MmjaxError("no public layout of CLIP holds an ordinary ResNet as its image tower")

    def pair(source: str, target: str, i: int) -> list[Entry]:
        kernel = Entry(f"visual.{source}conv{i}.weight", f"params/vision/{target}conv{i}/kernel", conv)
        return [kernel, *_batch_norm(f"visual.{source}bn{i}", f"vision/{target}bn{i}")]

    entries = [entry for i in (1, 2, 3) for entry in pair("", "stem_", i)]
    for stage, count in enumerate(vision.layers, 1):
        for block in range(count):
            source, target = f"layer{stage}.{block}.", f"stage{stage}_block{block}/"
            entries += [entry for i in (1, 2, 3) for entry in pair(source, target, i)]
            if not block:
                kernel = f"params/vision/{target}shortcut_conv/kernel"
                entries.append(Entry(f"visual.{source}downsample.0.weight", kernel, conv))
                entries += _batch_norm(f"visual.{source}downsample.1", f"vision/{target}shortcut_bn")
    entries.append(Entry("visual.attnpool.positional_embedding", "params/vision/attention_pool/positions"))
    for target, source in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "c")):
        entries += _dense(f"visual.attnpool.{source}_proj", f"vision/attention_pool/{target}")
    return entries


def openai_config(shapes: Shapes, config_json: ConfigJson, text: str = "", act: str = "quick_gelu") -> CLIPConfig:
    """From shapes, as in `build_model` (model.py:399-422); open_clip_config.json has precedence, if it exists."""
    model = (config_json or {}).get("model_cfg", config_json) or {}
    length, width = shapes[f"{text}positional_embedding"]
    vocabulary, embed_dim = shapes[f"{text}token_embedding.weight"][0], shapes[f"{text}text_projection"][1]
    hidden, depth = _blocks(shapes, f"{text}transformer.resblocks")
    heads = model.get("text_cfg", {}).get("heads", max(width // 64, 1))
    if "quick_gelu" in model or "embed_dim" in model:
        act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return CLIPConfig(
        openai_vision(shapes, model.get("vision_cfg", {})),
        CLIPTextConfig(length, vocabulary, width, depth, heads, hidden),
        embed_dim,
        act,
        init_bias=-10.0 if "logit_bias" in shapes else None,
    )


def openai_vision(shapes: Shapes, vision_cfg: Mapping[str, Any]) -> ViTConfig | ResNetConfig:
    """The config of the image tower (keys "visual."). vision_cfg: of open_clip_config.json."""
    if "visual.proj" not in shapes:
        positions, channels = shapes["visual.attnpool.positional_embedding"]
        layers = tuple(_count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        heads, side = channels // vision_cfg.get("head_width", 64), 32 * round((positions - 1) ** 0.5)
        return ResNetConfig.clip(side, layers, channels // 32, heads, shapes["visual.attnpool.c_proj.bias"][0])
    width, _, patch, _ = shapes["visual.conv1.weight"]
    hidden, depth = _blocks(shapes, "visual.transformer.resblocks")
    grid = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
    known = width // vision_cfg["head_width"] if "head_width" in vision_cfg else None
    heads = known or WIDE_HEADS.get(width, max(width // 64, 1))
    return ViTConfig.clip(grid * patch, patch, width, depth, heads, hidden)


def _blocks(shapes: Shapes, prefix: str) -> tuple[int, int]:
    """(width of the feed-forward, number of blocks)."""
    return shapes[f"{prefix}.0.mlp.c_fc.weight"][0], _count(shapes, re.escape(prefix) + r"\.(\d+)\.")


def _count(shapes: Shapes, pattern: str) -> int:
    return len({match[1] for match in (re.match(pattern, key) for key in shapes) if match})


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """The "model_cfg" of open_clip_config.json."""
    text, vision = config.text, config.vision
    fields: dict[str, Any] = {"embed_dim": config.embed_dim, "quick_gelu": config.act == "quick_gelu"}
    if isinstance(vision, ViTConfig):
        fields["vision_cfg"] = {
            "image_size": config.image_size,
            "layers": vision.depth,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": vision.hidden / vision.width,
            "patch_size": vision.patch,
        }
    elif vision.attention_pool is not None:
        fields["vision_cfg"] = {"image_size": config.image_size, "layers": list(vision.layers)}
        fields["vision_cfg"] |= {"width": vision.stem_width}
        fields["vision_cfg"]["head_width"] = vision.channels // vision.attention_pool.heads
    fields["text_cfg"] = {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width}
    fields["text_cfg"] |= {"heads": text.heads, "layers": text.depth}
    return fields


# -------------------------------------------------------------------------------------------------------- Hugging Face


def hf_table(config: CLIPConfig) -> Table:
    vision, text = config.vision, config.text
    if not isinstance(vision, ViTConfig) or config.init_bias is not None:
        raise MmjaxError("Hugging Face's CLIPModel has a ViT as its image tower, and no logit_bias")
    entries = [
        *_scalars(config),
        Entry("text_model.embeddings.token_embedding.weight", "params/text/token_embedding"),
        Entry("text_model.embeddings.position_embedding.weight", "params/text/positions"),
        *_norm("text_model.final_layer_norm", "text/norm"),
        Entry("text_projection.weight", "params/text/projection/kernel", linear),
        Entry("visual_projection.weight", "params/vision_projection/kernel", linear),
    ]
    return (*entries, *hf_tower_table(vision), *_hf_blocks("text", text.depth))


def hf_tower_table(vision: ViTConfig) -> Table:
    """The image tower alone, as in CLIPVisionModel; its parameters are under params/vision."""
    around = ("class_embedding", "position_embedding.weight", "patch_embedding.weight")
    around = (*(f"embeddings.{name}" for name in around), "pre_layrnorm", "post_layernorm")
    return (*_tower(vision, "vision_model", around), *_hf_blocks("vision", vision.depth))


def _hf_blocks(tower: str, depth: int) -> list[Entry]:
    entries = []
    for i in range(depth):
        source, target = f"{tower}_model.encoder.layers.{i}", f"{tower}/encoder/block_{i}"
        for j in (1, 2):
            entries += _norm(f"{source}.layer_norm{j}", f"{target}/norm_{j}")
        for name in ("q", "k", "v", "out"):
            entries += _dense(f"{source}.self_attn.{name}_proj", f"{target}/attention/{name}")
        entries += _dense(f"{source}.mlp.fc1", f"{target}/mlp/up") + _dense(f"{source}.mlp.fc2", f"{target}/mlp/down")
    return entries


def hf_config_of(shapes: Shapes, config_json: ConfigJson) -> CLIPConfig:
    """The config, from config.json: heads and activation are nowhere else. CLIPConfig's defaults fill the rest."""
    config_json = config_json or {}
    text = {**(config_json.get("text_config") or {}), **(config_json.get("text_config_dict") or {})}
    vision = {**(config_json.get("vision_config") or {}), **(config_json.get("vision_config_dict") or {})}
    length, width = shapes["text_model.embeddings.position_embedding.weight"]
    text_config = CLIPTextConfig(
        length,
        shapes["text_model.embeddings.token_embedding.weight"][0],
        width,
        _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        text.get("num_attention_heads", 8),
        shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        # 2 is a mistake in the configs of OpenAI's weights, and means the largest id.
        None if text.get("eos_token_id", 49407) == 2 else text.get("eos_token_id", 49407),
    )
    vision_config = hf_tower_config(shapes, vision.get("num_attention_heads", 12))
    acts = {part.get("hidden_act", "quick_gelu") for part in (text, vision)}
    epsilons = {part.get("layer_norm_eps", 1e-5) for part in (text, vision)}
    if len(acts) != 1 or not acts <= ACTIVATIONS.keys() or epsilons != {1e-5}:
        raise MmjaxError(f"config.json: hidden_act {sorted(acts)}, layer_norm_eps {sorted(epsilons)} are not CLIP's")
    return CLIPConfig(vision_config, text_config, shapes["text_projection.weight"][0], ACTIVATIONS[acts.pop()])


def hf_tower_config(shapes: Shapes, heads: int, **fields: Any) -> ViTConfig:
    """The config of the image tower; its heads are in no array. fields: of `ViTConfig`."""
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    return ViTConfig.clip(
        round((shapes["vision_model.embeddings.position_embedding.weight"][0] - 1) ** 0.5) * patch,
        patch,
        width,
        _count(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        heads,
        shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        **fields,
    )


def hf_config(config: CLIPConfig) -> dict[str, Any]:
    """config.json of a CLIPModel."""
    text, vision = config.text, config.vision
    assert isinstance(vision, ViTConfig)
    # For transformers eos_token_id=2 means to pool at the largest id.
    of_text = _hf_sizes("text", text, config.act, config.embed_dim) | {"vocab_size": text.vocab_size}
    of_text |= {"max_position_embeddings": text.context_length, "bos_token_id": None}
    of_text |= {"eos_token_id": 2 if text.eos is None else text.eos}
    of_vision = hf_tower_fields(dataclasses.replace(vision, act=config.act), config.embed_dim)  # type: ignore[arg-type]
    hf_config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.embed_dim}
    return hf_config | {"logit_scale_init_value": 2.6592, "text_config": of_text, "vision_config": of_vision}


def hf_tower_fields(vision: ViTConfig, embed_dim: int) -> dict[str, Any]:
    """The vision_config of a config.json."""
    fields = _hf_sizes("vision", vision, vision.act, embed_dim)
    return fields | {"image_size": vision.image_size[0], "patch_size": vision.patch, "num_channels": 3}


def _hf_sizes(name: str, tower: CLIPTextConfig | ViTConfig, act: str, embed_dim: int) -> dict[str, Any]:
    return {
        "model_type": f"clip_{name}_model",
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": next(public for public, ours in ACTIVATIONS.items() if ours == act),
        "layer_norm_eps": 1e-5,
        "projection_dim": embed_dim,
    }


# ------------------------------------------------------------------------------------------------------------- layouts


def _recognise(needed: str) -> Callable[[Set[str], ConfigJson], bool]:
    """Recognises a layout by a key."""

    def recognise(keys: Set[str], config_json: ConfigJson) -> bool:
        if needed not in keys or not any(key.startswith(("visual.", "visual_projection")) for key in keys):
            return False
        # open_clip around a tower of timm or of transformers; transformers' BlipModel
        others = ("visual.trunk.", "text.transformer.embeddings.", "text_model.encoder.layer.")
        return not any(key.startswith(others) for key in keys)

    return recognise


def _is_open_clip(keys: Set[str], config_json: ConfigJson) -> bool:
    return config_json is not None and ("model_cfg" in config_json or "vision_cfg" in config_json)


def _is_openai(keys: Set[str], config_json: ConfigJson) -> bool:
    """OpenAI's archives contain sizes. Their activation differs from that of open_clip's files with the same keys."""
    return not _is_open_clip(keys, config_json) and (config_json is not None or "input_resolution" in keys)


IGNORED = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")
CUSTOM = ("text.", "gelu")

OPENAI = Layout(
    "openai",
    _recognise("text_projection"),
    openai_config,
    openai_table,
    decides=_is_openai,
    ignored=IGNORED,
    file="model.safetensors",
    assumed={"act": ""},
)
OPEN_CLIP = Layout(
    "open_clip",
    _recognise("text_projection"),
    lambda shapes, config_json: openai_config(shapes, config_json, act="gelu"),
    openai_table,
    decides=_is_open_clip,
    hf_config=lambda config: {"model_cfg": open_clip_config(config)},
    file="open_clip_model.safetensors",
    ignored=IGNORED,
)
OPEN_CLIP_CUSTOM_TEXT = Layout(
    "open_clip_custom_text",
    _recognise("text.text_projection"),
    lambda shapes, config_json: openai_config(shapes, config_json, *CUSTOM),
    lambda config: openai_table(config, "text."),
    hf_config=lambda config: {"model_cfg": open_clip_config(config) | {"custom_text": True}},
    file="open_clip_model.safetensors",
    ignored=IGNORED,
    assumed={"act": "model_cfg.quick_gelu", "text.heads": "model_cfg.text_cfg.heads"},
)
HF = Layout(
    "hf",
    _recognise("text_projection.weight"),
    hf_config_of,
    hf_table,
    hf_config=hf_config,
    ignored=("*.embeddings.position_ids",),
    assumed={
        "act": "vision_config.hidden_act",
        "vision.heads": "vision_config.num_attention_heads",
        "text.heads": "text_config.num_attention_heads",
    },
)
LAYOUTS: tuple[Layout, ...] = (OPENAI, OPEN_CLIP, OPEN_CLIP_CUSTOM_TEXT, HF)
