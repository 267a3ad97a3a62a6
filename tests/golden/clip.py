"""Vaults openai_clip_vit, openai_clip_rn, open_clip_vit and open_clip_custom_text."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.models.clip.checkpoint import OPEN_CLIP_CUSTOM_TEXT, OPENAI
from mmjax.models.clip.network import CLIP, CLIPConfig, CLIPTextConfig
from mmjax.models.clip.tasks import CLIPModel
from mmjax.models.resnet.network import ResNetConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.nn.norm import l2_normalize
from mmjax.objectives.contrastive import clip_loss
from mmjax.weights.table import load_table, save_table


def openai(recorded):
    width, heads = recorded["vision_width"], recorded["vision_heads"]
    if isinstance(recorded["vision_layers"], list):
        sizes = (recorded["image_resolution"], tuple(recorded["vision_layers"]), width, heads, recorded["embed_dim"])
        vision = ResNetConfig.clip(*sizes)
    else:
        patch, depth = recorded["vision_patch_size"], recorded["vision_layers"]
        vision = ViTConfig.clip(recorded["image_resolution"], patch, width, depth, heads, 4 * width)
    width, depth, heads = (recorded[f"transformer_{name}"] for name in ("width", "layers", "heads"))
    text = CLIPTextConfig(recorded["context_length"], recorded["vocab_size"], width, depth, heads, 4 * width)
    return CLIPConfig(vision, text, recorded["embed_dim"], re.match(r"\w+", recorded["act"])[0])


def open_clip(recorded):
    vision, text = recorded["vision_cfg"], recorded["text_cfg"]
    width, head = vision["width"], vision.get("head_width", 64)
    if isinstance(vision["layers"], list):
        layers, heads = tuple(vision["layers"]), 32 * width // head
        image = ResNetConfig.clip(vision["image_size"], layers, width, heads, recorded["embed_dim"])
    else:
        hidden = int(width * vision.get("mlp_ratio", 4.0))
        image = ViTConfig.clip(
            vision["image_size"], vision["patch_size"], width, vision["layers"], width // head, hidden
        )
    words = CLIPTextConfig(
        text["context_length"], text["vocab_size"], text["width"], text["layers"], text["heads"], 4 * text["width"]
    )
    return CLIPConfig(image, words, recorded["embed_dim"], "quick_gelu" if recorded.get("quick_gelu") else "gelu")


def check(meta, tensors):
    recorded = meta["config"]
    config = open_clip(recorded) if "vision_cfg" in recorded else openai(recorded)
    layout = OPEN_CLIP_CUSTOM_TEXT if "weights/text.text_projection" in tensors else OPENAI
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    names = layout.unwrap(weights)
    arrays = {name: weights[key] for name, key in names.items()}
    variables = load_table(layout.table(config), arrays, CLIPModel.shapes(config), meta["name"])
    stats = {"batch_stats": variables["stats"]} if "stats" in variables else {}
    pixels = jnp.asarray(tensors["inputs/image"].transpose(0, 2, 3, 1))
    ids = jnp.asarray(tensors["inputs/text"].astype(np.int32))

    def loss(params):
        out = CLIP(config).apply({"params": params, **stats}, pixels, ids)
        image, text = out["vision"]["embeds"], out["text"]["embeds"]
        return clip_loss(l2_normalize(image), l2_normalize(text), params["logit_scale"]), out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    results = outputs(out, jnp.exp(variables["params"]["logit_scale"]), open_clip="vision_cfg" in recorded)
    saved = save_table(layout.table(config), {"params": grads} | ({"stats": variables["stats"]} if stats else {}))
    return results | {f"grad/{key}": array for key, array in saved.items()} | {"contrastive_loss": value, "loss": value}


def outputs(out, scale, open_clip):
    vision, text = out["vision"], out["text"]
    image, words = l2_normalize(vision["embeds"]), l2_normalize(text["embeds"])
    logits = scale * image @ words.T
    raw = {"image_features": vision["embeds"], "text_features": text["embeds"]}
    results = {f"raw_{name}": value for name, value in raw.items()}
    results |= {"image_features": image, "text_features": words} if open_clip else raw
    results |= {"logits_per_image": logits, "logits_per_text": logits.T, "logit_scale_exp": scale}
    results["text_hidden"] = text["states"][-1]
    if "states" in vision:
        return results | {"visual_pre": vision["states"][0], "visual_hidden": vision["states"][-1]}
    return results | {f"visual_layer{i}": vision[f"C{i + 1}"].transpose(0, 3, 1, 2) for i in (1, 2, 3, 4)}
