"""Tiny LLaVAs and pictures, shared by the tests."""

import jax.numpy as jnp
import numpy as np
from models.tiny_text import chat_tokenizer, random_params

from mmjax.models.language.config import DecoderConfig
from mmjax.models.llava.tasks import LlavaModel
from mmjax.models.vision_language.network import VisionLanguageConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.tree import map_with_path

VISION = ViTConfig.clip(8, 4, 12, 2, 2, 18)
"""Four features of each picture."""
GRIDS = ((2, 1), (1, 2), (2, 2))


def tiny_llava(seed: int = 0, **fields) -> LlavaModel:
    """A vocabulary 16 ids larger than the tokenizer's; texts of printable characters."""
    tokenizer = chat_tokenizer()
    size = {"vocab_size": tokenizer.vocab_size + 16, "kv_heads": 1, "head_width": 6, "eos": tokenizer.eos}
    decoder = DecoderConfig.llama(12, 2, 2, 20, **size, pad=tokenizer.pad)
    config = VisionLanguageConfig(VISION, decoder, **{"template": "vicuna_v1", **fields})
    params = random_params(LlavaModel, config, seed)
    plain = [tokenizer.decode([i]).isascii() and tokenizer.decode([i]).isprintable() for i in range(size["vocab_size"])]
    kernel = jnp.where(jnp.asarray(plain), params["language"]["head"]["kernel"], 0)
    params = {**params, "language": {**params["language"], "head": {"kernel": kernel}}}
    # Answers depend on images: attention is sharp, and the features of two images differ by more than a bias.
    params = map_with_path(lambda path, leaf: 4 * leaf if "attention" in path else leaf, params)
    if "connector" in params:
        params["connector"] = map_with_path(lambda path, leaf: leaf * 3 * ("kernel" in path), params["connector"])
    model = LlavaModel(config, params, tokenizer=tokenizer)
    return model.replace(preprocess=LlavaModel.default_preprocess(config, "llava"))


def tiled(seed: int = 0) -> LlavaModel:
    """With tiles of any resolution."""
    return tiny_llava(seed, grids=GRIDS, merge="spatial_unpad")


def picture(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    """uint8 [height, width, 3], blocks of colour."""
    blocks = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return np.kron(blocks, np.ones((height // 2 + 1, width // 2 + 1, 1), np.uint8))[:height, :width]
