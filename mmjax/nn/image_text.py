"""The heads on an image encoder and a text encoder that image-text networks share: projections, ITM head, classes."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mmjax.nn.norm import l2_normalize
from mmjax.nn.transformer import torch_linear
from mmjax.types import Array, Float


class ImageTextHeads(nn.Module):
    """Base of a network; it has no encoders, its subclass calls `set_up_heads` in `setup`.

    Params: as configured vision_proj, text_proj, itm_head, cls_hidden and cls_head.
    """

    def set_up_heads(self, config: Any) -> None:
        """config: `embed_dim`, `matching` and `classes`, 0 or False: no such head; `vision.width`, `text.width`."""
        text = config.text.width
        if config.embed_dim:
            self.vision_proj = torch_linear(config.embed_dim, config.vision.width)
            self.text_proj = torch_linear(config.embed_dim, text)
        if config.matching:
            self.itm_head = torch_linear(2, text)
        if config.classes:
            self.cls_hidden, self.cls_head = torch_linear(text, text), torch_linear(config.classes, text)

    def image_embeds(self, image_tokens: Float[Array, "b n d"]) -> Float[Array, "b e"]:
        """Unit-norm features, from the class token."""
        return l2_normalize(self.vision_proj(image_tokens[:, 0]))

    def text_embeds(self, text_states: Float[Array, "b l d"]) -> Float[Array, "b e"]:
        """Unit-norm features, from the first token ([CLS]) of the states of the text alone."""
        return l2_normalize(self.text_proj(text_states[:, 0]))

    def itm_logits(self, states: Float[Array, "b l d"]) -> Float[Array, "b 2"]:
        """Logits of the first token of text and image together; class 1: they match."""
        return self.itm_head(states[:, 0]).astype(jnp.float32)

    def classify(self, states: Float[Array, "b l d"]) -> Float[Array, "b c"]:
        """Logits of the first token of text and image together."""
        return self.cls_head(jax.nn.relu(self.cls_hidden(states[:, 0]))).astype(jnp.float32)
