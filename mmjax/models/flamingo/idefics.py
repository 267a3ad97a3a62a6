"""Idefics (HuggingFaceM4/idefics-9b), a second source of Flamingo's weights: transformers' IdeficsForVisionText2Text.

It is a LLaMA whose cross attention too has RMSNorms and gated feed-forwards, in a layer before block 0, n, 2 n, ...;
the class token is among the media. Its processor lets no token attend to an image after the end of a text.
"""

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from mmjax.errors import MmjaxError
from mmjax.models.clip import checkpoint as clip
from mmjax.models.flamingo.config import FlamingoConfig, ResamplerConfig
from mmjax.models.language import checkpoint as language
from mmjax.models.language.tables import table as language_table
from mmjax.models.vit.network import ViTConfig
from mmjax.weights.compose import moved
from mmjax.weights.table import Entry, Layout, Shape, Table, linear, reshape

Shapes = Mapping[str, Shape]
ConfigJson = Mapping[str, Any] | None
EMBEDDING, RESAMPLER, CROSS = "model.embed_tokens", "model.perceiver_resampler", "model.gated_cross_attn_layers"


def table(config: FlamingoConfig) -> Table:
    """The entries of the whole model. Raises MmjaxError for another form, or an image encoder that is not CLIP's."""
    check(config)
    c, vision = config.language, config.vision
    assert isinstance(vision, ViTConfig)
    tower = [replace(entry, source=f"model.{entry.sources[0]}") for entry in clip.hf_tower_table(vision)]
    entries = [moved(entry, "", "language") for entry in language_table(replace(c, added_tokens=0))]
    if c.added_tokens:
        added = Entry(f"{EMBEDDING}.additional_embedding.weight", "params/language/added_embedding")
        head = "lm_head.additional_fc.weight"
        entries += [replace(added, copies=(head,))] if c.tied else [added]
        entries += [] if c.tied else [Entry(head, "params/language/added_head/kernel", linear)]
    for number, block in enumerate(config.crossed):
        entries += _cross(f"{CROSS}.{number}", f"cross_{block}", config)
    return (*tower, *entries, *_resampler(config.resampler))


def check(config: FlamingoConfig) -> None:
    """Raises MmjaxError for a config that transformers' class cannot have."""
    c = config.language
    usual = (c.heads, c.head_width, c.hidden)
    same = config.form == "llama" and config.class_token and config.only_last and c.family == "llama"
    same = same and (config.heads, config.head_width, config.hidden) == usual and config.crossed[0] == 0
    r = config.resampler
    plain = r is None or (r.act == "relu" and r.hidden is None and not r.frames and not r.media)
    if not (same and plain and isinstance(config.vision, ViTConfig) and not config.embed_dim):
        raise MmjaxError("layout='idefics': a LLaMA with cross attention of its own form and sizes, over a CLIP's ViT")


def _norm(source: str, target: str, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{source}.weight", f"params/{target}/scale")]
    return entries + ([Entry(f"{source}.bias", f"params/{target}/bias")] if bias else [])


def _matrices(source: str, target: str, names: Mapping[str, str]) -> list[Entry]:
    return [
        Entry(f"{source}.{public}.weight", f"params/{target}/{ours}/kernel", linear) for public, ours in names.items()
    ]


def _cross(source: str, target: str, config: FlamingoConfig) -> list[Entry]:
    entries = _norm(f"{source}.input_layernorm", f"{target}/norm", False)
    entries += _norm(f"{source}.post_attention_layernorm", f"{target}/mlp_norm", False)
    projections = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
    entries += _matrices(f"{source}.cross_attn", f"{target}/attention", projections)
    mlp = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    entries += _matrices(f"{source}.mlp", f"{target}/mlp", mlp)
    if config.qk_norm:
        for name in "qk":
            entries += _norm(f"{source}.cross_attn.{name}_layer_norm", f"{target}/attention/{name}_norm", False)
    width = config.language.width
    gate = reshape((1, 1, width), (width,)) if config.vector_gates else reshape((1,), ())
    entries.append(Entry(f"{source}.alpha_cross_attn", f"params/{target}/gate", gate))
    return [*entries, Entry(f"{source}.alpha_dense", f"params/{target}/mlp_gate", gate)]


def _resampler(config: ResamplerConfig | None) -> list[Entry]:
    if config is None:
        return []
    entries = [Entry(f"{RESAMPLER}.latents", "params/resampler/latents")]
    entries += _norm(f"{RESAMPLER}.layer_norm", "resampler/norm")
    projections = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "output_proj": "out"}
    for j in range(config.depth):
        source, target = f"{RESAMPLER}.blocks.{j}", f"resampler/layer_{j}"
        entries += _norm(f"{source}.0.context_layer_norm", f"{target}/media_norm")
        entries += _norm(f"{source}.0.latents_layer_norm", f"{target}/latent_norm")
        entries += _matrices(f"{source}.0", f"{target}/attention", projections)
        if config.qk_norm:
            for name in "qk":
                entries += _norm(f"{source}.0.{name}_layer_norm", f"{target}/attention/{name}_norm")
        entries += _norm(f"{source}.1.ln", f"{target}/mlp_norm")
        entries += _matrices(f"{source}.1", f"{target}/mlp", {"fc": "up", "c_proj": "down"})
    return entries


# -------------------------------------------------------------------------------------------------------- config.json


def config_of(shapes: Shapes, config_json: ConfigJson) -> FlamingoConfig:
    """From config.json and the arrays' shapes. What config.json leaves out has transformers' defaults.

    `<image>` is the last id, as in idefics-9b; a tokenizer.json beside the weights determines it.
    """
    fields = dict(config_json or {})
    decoder = language.config_of({}, {"pad_token_id": 0, **fields, "model_type": "llama"})
    added = shapes.get(f"{EMBEDDING}.additional_embedding.weight", (0,))[0]
    decoder = replace(decoder, added_tokens=added)
    heads, latents = fields.get("perceiver_config") or {}, shapes.get(f"{RESAMPLER}.latents")
    first = f"{CROSS}.0"
    return FlamingoConfig(
        _vision(shapes, fields.get("vision_config") or {}),
        decoder,
        None if latents is None else _resampler_config(shapes, latents, heads.get("resampler_n_heads", 16)),
        class_token=True,
        every=fields.get("cross_layer_interval", 1),
        first=0,
        heads=decoder.heads,
        head_width=decoder.head_width,
        hidden=decoder.hidden,
        form="llama",
        qk_norm=f"{first}.cross_attn.q_layer_norm.weight" in shapes,
        vector_gates=shapes.get(f"{first}.alpha_dense", (1,)) != (1,),
        initial_gate=float(fields.get("alpha_initializer") == "ones"),
        image_token=decoder.vocab_size + added - 1,
        end_of_chunk=None,
        end_of_text=decoder.eos[0] if decoder.eos else None,
    )


def _vision(shapes: Shapes, fields: Mapping[str, Any]) -> ViTConfig:
    visual = {key.removeprefix("model."): shape for key, shape in shapes.items() if key.startswith("model.vision")}
    act = fields.get("hidden_act", "gelu")
    if act not in clip.ACTIVATIONS:
        raise MmjaxError(f"config.json: vision_config.hidden_act {act!r}; known are {', '.join(clip.ACTIVATIONS)}")
    epsilon = fields.get("layer_norm_eps", 1e-5)
    heads = fields.get("num_attention_heads", 16)
    return clip.hf_tower_config(visual, heads, act=clip.ACTIVATIONS[act], epsilon=epsilon)


def _resampler_config(shapes: Shapes, latents: Shape, heads: int) -> ResamplerConfig:
    depth = len({key.split(".")[3] for key in shapes if key.startswith(f"{RESAMPLER}.blocks.")})
    inner = shapes[f"{RESAMPLER}.blocks.0.0.q_proj.weight"][0]
    qk_norm = f"{RESAMPLER}.blocks.0.0.q_layer_norm.weight" in shapes
    return ResamplerConfig(depth, heads, inner // heads, latents[0], act="relu", qk_norm=qk_norm)


def hf_config(config: FlamingoConfig) -> dict[str, Any]:
    """The config.json of an IdeficsForVisionText2Text."""
    check(config)
    c, vision, r = config.language, config.vision, config.resampler
    assert isinstance(vision, ViTConfig)
    fields = language.hf_config(replace(c, added_tokens=0))
    tower = clip.hf_tower_fields(vision, 0)
    dropped = ("hidden_size", "projection_dim", "model_type")
    tower = {name: value for name, value in tower.items() if name not in dropped}
    tower |= {"model_type": "idefics_vision", "embed_dim": vision.width, "layer_norm_eps": vision.epsilon}
    perceiver: dict[str, Any] = {"model_type": "idefics_perciever", "use_resampler": r is not None}
    if r is not None:
        perceiver |= {"resampler_n_latents": r.latents, "resampler_depth": r.depth, "resampler_n_heads": r.heads}
        perceiver |= {"resampler_head_dim": r.head_width, "qk_layer_norms_perceiver": r.qk_norm}
    return fields | {
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        "additional_vocab_size": c.added_tokens,
        "cross_layer_interval": config.every,
        "qk_layer_norms": config.qk_norm,
        "alpha_type": "vector" if config.vector_gates else "float",
        "alpha_initializer": "ones" if config.initial_gate else "zeros",
        "use_resampler": r is not None,
        "vision_config": tower,
        "perceiver_config": perceiver,
    }


def _recognise(keys: Set[str], config_json: ConfigJson) -> bool:
    return f"{CROSS}.0.alpha_cross_attn" in keys and f"{EMBEDDING}.weight" in keys


IDEFICS = Layout(
    "idefics",
    _recognise,
    config_of,
    table,
    hf_config,
    wrappers=("state_dict",),
    ignored=("*rotary_emb.inv_freq", "*.position_ids"),
)
