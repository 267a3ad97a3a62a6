"""OpenFlamingo's state dict, whole, and the part of it that its training files hold.

A file of a whole model has the arrays of the language model's blocks and of the cross attention under two names each:
an export writes those that OpenFlamingo's own training writes, both are read. Training files hold the resampler, the
cross attention and embeddings alone: `trained_part` and `with_trained_part` write and read them.

Beside a whole model lies a config.json of ours, since OpenFlamingo has none: "lang_config" and "vision_config" have the
forms of transformers and open_clip, other names are the arguments of open_flamingo's factory.py and helpers.py.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.models.clip import checkpoint as clip
from mmjax.models.clip.network import CLIPConfig
from mmjax.models.flamingo.config import FlamingoConfig, ResamplerConfig
from mmjax.models.flamingo.idefics import IDEFICS
from mmjax.models.language import checkpoint as language
from mmjax.models.language.tables import parts
from mmjax.models.language.tables import table as language_table
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Shape, Table, WeightsError, chain, linear, reshape, save_table, split
from mmjax.weights.table import load_table as load

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
BLOCKS = {
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "mpt": "transformer.blocks",
}
"""family -> the key of its blocks; of all others "model.layers" (factory.py:132-141)."""
LANGUAGE, VISION = "lang_encoder", "vision_encoder"
CROSS = re.compile(rf"{LANGUAGE}\.(?:.+\.(\d+)\.gated_cross_attn_layer|gated_cross_attn_layers\.(\d+))\.")
"""A key of the layer before block n, under either name."""


# --------------------------------------------------------------------------------------------------------------- tables


def table(config: FlamingoConfig) -> Table:
    """The entries of the whole model. Raises MmjaxError for a form that OpenFlamingo has not."""
    r = config.resampler
    form = (config.form, config.qk_norm, config.vector_gates, config.class_token, config.end_of_chunk is None)
    if form != ("open_flamingo", False, False, False, False) or r is None or r.act != "gelu" or r.qk_norm:
        raise MmjaxError("layout='open_flamingo': the resampler and the cross attention have OpenFlamingo's form")
    return (*_vision_entries(config), *_language_entries(config), *trained_entries(config))


def trained_entries(config: FlamingoConfig) -> list[Entry]:
    """The entries of the resampler and the cross attention."""
    entries = _resampler_entries(config)
    blocks = _blocks_of(config)
    for i in config.crossed:
        for entry in _cross_entries(f"cross_{i}"):
            source = f"{blocks}.{i}.gated_cross_attn_layer.{entry.source}"
            copy = f"{LANGUAGE}.gated_cross_attn_layers.{i}.{entry.source}"
            entries.append(replace(entry, source=source, copies=(copy,)))
    return entries


def _blocks_of(config: FlamingoConfig) -> str:
    return f"{LANGUAGE}.{BLOCKS.get(config.language.family, 'model.layers')}"


def _norm(source: str, target: str) -> list[Entry]:
    return [Entry(f"{source}.weight", f"params/{target}/scale"), Entry(f"{source}.bias", f"params/{target}/bias")]


def _attention(source: str, target: str) -> list[Entry]:
    """Keys are the first half of to_kv, values the second."""
    kernels = tuple(f"params/{target}/{name}/kernel" for name in "kv")
    return [
        Entry(f"{source}.to_q.weight", f"params/{target}/q/kernel", linear),
        Entry(f"{source}.to_kv.weight", kernels, chain(split(2), linear)),
        Entry(f"{source}.to_out.weight", f"params/{target}/out/kernel", linear),
    ]


def _mlp(source: str, target: str) -> list[Entry]:
    """A torch Sequential: norm, matrix, GELU, matrix."""
    return [
        *_norm(f"{source}.0", f"{target}/mlp_norm"),
        Entry(f"{source}.1.weight", f"params/{target}/mlp/up/kernel", linear),
        Entry(f"{source}.3.weight", f"params/{target}/mlp/down/kernel", linear),
    ]


def _cross_entries(target: str) -> list[Entry]:
    gates = (("attn_gate", "gate"), ("ff_gate", "mlp_gate"))
    return [
        *_norm("attn.norm", f"{target}/norm"),
        *_attention("attn", f"{target}/attention"),
        *_mlp("ff", target),
        *(Entry(name, f"params/{target}/{gate}", reshape((1,), ())) for name, gate in gates),
    ]


def _resampler_entries(config: FlamingoConfig) -> list[Entry]:
    r, start = config.resampler, "resampler"
    assert r is not None
    entries = [Entry("perceiver.latents", f"params/{start}/latents"), *_norm("perceiver.norm", f"{start}/norm")]
    if r.frames:
        entries.append(Entry("perceiver.frame_embs", f"params/{start}/frame_embedding"))
    if r.media:
        path = f"params/{start}/media_embedding"
        entries.append(Entry("perceiver.media_time_embs", path, reshape((r.media, 1, config.channels))))
    for j in range(r.depth):
        source, target = f"perceiver.layers.{j}", f"{start}/layer_{j}"
        entries += _norm(f"{source}.0.norm_media", f"{target}/media_norm")
        entries += _norm(f"{source}.0.norm_latents", f"{target}/latent_norm")
        entries += _attention(f"{source}.0", f"{target}/attention") + _mlp(f"{source}.1", target)
    # The layout's last op takes the target's shape, so that [m, 1, d] becomes [m, d].
    return entries


def _language_entries(config: FlamingoConfig) -> list[Entry]:
    """Transformers' entries; the added rows are the last ones of its embedding and head."""
    c, blocks = config.language, _blocks_of(config)
    rows = parts((c.vocab_size, c.added_tokens))
    entries = []
    for entry in language_table(replace(c, vocab_size=c.vocab_size + c.added_tokens, added_tokens=0)):
        entry = moved(entry, f"{LANGUAGE}.", "language")
        path = entry.targets[0]
        if c.added_tokens and path == "params/language/token_embedding":
            entry = replace(entry, target=(path, "params/language/added_embedding"), op=rows)
        elif c.added_tokens and path == "params/language/head/kernel":
            entry = replace(entry, target=(path, "params/language/added_head/kernel"), op=chain(rows, linear))
        block = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", entry.sources[0])
        if block:
            i, name = block.groups()
            copy = f"{LANGUAGE}.old_decoder_blocks.{i}.{name}"
            entry = replace(entry, source=f"{blocks}.{i}.decoder_layer.{name}", copies=(copy,))
        entries.append(entry)
    return entries


def _vision_entries(config: FlamingoConfig) -> list[Entry]:
    """open_clip's image tower under another name. Raises MmjaxError for an image encoder that is not CLIP's."""
    vision = config.vision
    alike = vision.attention_pool is not None if isinstance(vision, ResNetConfig) else _is_clip(vision)
    if not alike or (isinstance(vision, ViTConfig) and not config.embed_dim):
        raise MmjaxError("layout='open_flamingo': the image encoder is one of CLIP with its projection (embed_dim)")
    act = vision.act if isinstance(vision, ViTConfig) else "quick_gelu"
    whole = CLIPConfig(vision, embed_dim=config.embed_dim or vision.features, act=act)  # type: ignore[union-attr]
    tower = [entry for entry in clip.openai_table(whole) if entry.sources[0].startswith("visual.")]
    return [replace(entry, source=entry.sources[0].replace("visual", VISION, 1)) for entry in tower]


def _is_clip(vision: ViTConfig) -> bool:
    size = (vision.image_size[0], vision.patch, vision.width, vision.depth, vision.heads, vision.hidden)
    usual = ViTConfig.clip(*size)
    free = {name: getattr(vision, name) for name in ("act", "dtype", "remat", "rule", "init", "drop_path", "dropout")}
    return replace(usual, **free, attention_dropout=vision.attention_dropout) == vision


# -------------------------------------------------------------------------------------------------------- config.json


def config_of(shapes: Shapes, config_json: ConfigJson) -> FlamingoConfig:
    """The config of a whole model, from the arrays' shapes and config.json.

    Raises MmjaxError where the language model or the image encoder is missing, or config.json without "lang_config".
    """
    if not any(key.startswith(f"{VISION}.") for key in shapes):
        raise MmjaxError(
            "holds the trained part of a Flamingo alone, without the language model and the image encoder under it: "
            "load these, then FlamingoModel.assemble(language, vision, file)"
        )
    config_json = config_json or {}
    if "lang_config" not in config_json:
        raise MmjaxError('config.json: "lang_config", the config.json of the language model, is missing')
    whole = language.config_of({}, config_json["lang_config"])
    rows = _embedding_rows(shapes, whole)
    end = config_json.get("eoc_token_id", rows - 3)
    image = config_json.get("media_token_id", rows - 2)
    added = rows - min(end, image)
    pad = config_json.get("pad_token_id", whole.pad)
    visual = {key.replace(VISION, "visual", 1): shape for key, shape in shapes.items() if key.startswith(VISION)}
    vision = clip.openai_vision(visual, config_json.get("vision_config") or {})
    if isinstance(vision, ViTConfig) and not config_json.get("quick_gelu", True):
        vision = replace(vision, act="gelu")
    fields: dict[str, Any] = trained_fields(shapes, config_json, whole.depth)
    return FlamingoConfig(
        vision,
        replace(whole, vocab_size=rows - added, added_tokens=added, pad=pad),
        **fields,
        image_token=image,
        end_of_chunk=end,
        embed_dim=shapes[f"{VISION}.proj"][1] if f"{VISION}.proj" in shapes else 0,
    )


def trained_fields(shapes: Shapes, config_json: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """The fields of a `FlamingoConfig` that a training file determines; heads are 64 wide if config.json has none."""
    numbers = sorted({int(match[1] or match[2]) for match in map(CROSS.match, shapes) if match})
    if not numbers or "perceiver.latents" not in shapes:
        raise MmjaxError("has no resampler (perceiver.latents) or no gated_cross_attn_layer: not an OpenFlamingo file")
    every = config_json.get("cross_attn_every_n_layers")
    every = every or (numbers[1] - numbers[0] if len(numbers) > 1 else depth - numbers[0])
    cross, resampler = config_json.get("xattn") or {}, config_json.get("perceiver") or {}
    inner, hidden = (
        next(shape[0] for key, shape in shapes.items() if CROSS.match(key) and key.endswith(name))
        for name in (".attn.to_q.weight", ".ff.1.weight")
    )
    width = next(shape[0] for key, shape in shapes.items() if CROSS.match(key) and key.endswith(".attn.norm.weight"))
    heads = cross.get("heads", max(inner // 64, 1))
    fields: dict[str, Any] = {"every": every, "heads": heads, "head_width": inner // heads}
    fields |= {"first": None if numbers[0] == every - 1 else numbers[0]}
    fields |= {"hidden": None if hidden == 4 * width else hidden}
    fields["only_last"] = cross.get("only_attend_immediate_media", True)
    return fields | {"resampler": _resampler_config(shapes, resampler)}


def _resampler_config(shapes: Shapes, fields: Mapping[str, Any]) -> ResamplerConfig:
    latents, width = shapes["perceiver.latents"]
    inner, hidden = (shapes[f"perceiver.layers.0.{name}.weight"][0] for name in ("0.to_q", "1.1"))
    heads = fields.get("heads", max(inner // 64, 1))
    depth = len({key.split(".")[2] for key in shapes if key.startswith("perceiver.layers.")})
    frames, media = (shapes.get(f"perceiver.{name}", (0,))[0] for name in ("frame_embs", "media_time_embs"))
    hidden = None if hidden == 4 * width else hidden
    return ResamplerConfig(depth, heads, inner // heads, latents, hidden, frames, media)


def _embedding_key(config: Any) -> str:
    target = "params/token_embedding"
    return next(f"{LANGUAGE}.{entry.sources[0]}" for entry in language_table(config) if entry.targets[0] == target)


def _embedding_rows(shapes: Shapes, config: Any) -> int:
    """The number of ids. config: of the language model."""
    key = _embedding_key(config)
    if key not in shapes:
        raise MmjaxError(f"{key}, the embedding of the language model in config.json, is missing")
    return shapes[key][0]


def hf_config(config: FlamingoConfig) -> dict[str, Any]:
    """The config.json that `config_of` reads."""
    c, total = config, config.language.vocab_size + config.language.added_tokens
    assert c.resampler is not None
    lang = language.hf_config(replace(c.language, vocab_size=total, added_tokens=0))
    act = c.vision.act if isinstance(c.vision, ViTConfig) else "quick_gelu"
    embed_dim = c.embed_dim or c.vision.features  # type: ignore[union-attr]
    model = clip.open_clip_config(CLIPConfig(c.vision, embed_dim=embed_dim, act=act))
    return {
        "model_type": "open_flamingo",
        "lang_config": lang,
        "vision_config": model["vision_cfg"],
        "quick_gelu": act == "quick_gelu",
        "cross_attn_every_n_layers": c.every,
        "perceiver": {"heads": c.resampler.heads},
        "xattn": {"heads": c.heads, "only_attend_immediate_media": c.only_last},
        "media_token_id": c.image_token,
        "eoc_token_id": c.end_of_chunk,
        "pad_token_id": c.language.pad,
    }


def _recognise(keys: Set[str], config_json: ConfigJson) -> bool:
    return "perceiver.latents" in keys and any(key.startswith(f"{LANGUAGE}.") for key in keys)


OPEN_FLAMINGO = Layout(
    "open_flamingo",
    _recognise,
    config_of,
    table,
    hf_config,
    wrappers=("model_state_dict", "state_dict"),
    ignored=language.HF.ignored,
    assumed={"end_of_chunk": "eoc_token_id", "image_token": "media_token_id"},
)
LAYOUTS = (OPEN_FLAMINGO, IDEFICS)


# --------------------------------------------------------------------------------------------------------- trained part


def trained_part(config: FlamingoConfig, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a training file: resampler, cross attention, and the language model's embedding and head.

    The head is there where it is not tied: frozen, but with rows for the added tokens.
    """
    paths = {"params/language/added_embedding", "params/language/token_embedding"}
    paths |= {"params/language/head/kernel", "params/language/added_head/kernel"}
    embeddings = [entry for entry in _language_entries(config) if paths & set(entry.targets)]
    entries = (*trained_entries(config), *embeddings)
    targets = {path for entry in entries for path in entry.targets}
    leaves = {path: np.asarray(leaf) for path, leaf in tree.flatten(variables).items() if path in targets}
    return save_table(entries, tree.unflatten(leaves))


def with_trained_part(
    config: FlamingoConfig, variables: Mapping[str, Any], arrays: Mapping[str, Any], file: str
) -> dict[str, Any]:
    """The variables with the arrays of a training file, after `Layout.unwrap`, in place of theirs.

    Frozen arrays that a file may hold as well (the 4B models') replace those of the language model.
    Raises WeightsError, which lists every missing, unexpected and misshapen key.
    """
    base, entries = save_table(table(config), jax.tree.map(np.asarray, variables)), table(config)
    trained, missing = {entry.sources for entry in trained_entries(config)}, []
    for entry in entries:
        names = (*entry.sources, *entry.copies)
        if any(name in arrays for name in names):
            base.pop(entry.sources[0])
        elif entry.sources in trained:
            missing.append(entry.sources[0])
    if missing:
        raise WeightsError(
            f"{file} does not fit the model:\n  missing ({len(missing)}):\n    " + "\n    ".join(missing)
        )
    return load(entries, {**base, **arrays}, variables, file)
