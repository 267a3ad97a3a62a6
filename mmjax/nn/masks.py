"""Who may attend to whom: every mask of the lineage, a pure function each.

Masks are boolean, True = may attend, and broadcast to [b, h, l, s]. They are joined with `&`:

    BERT, ViT, T5's encoder          padding_mask(valid)
    GPT, CLIP's text tower           causal_mask(l, l) & padding_mask(valid)
    an encoder-decoder's decoder     causal_mask(l, l); its cross attention: padding_mask(valid of the encoder)
    a prefix language model          prefix_mask(prefix, l) & padding_mask(valid)
    Q-Former                         matching_mask, grounded_mask or contrastive_mask & padding_mask(valid)
    Flamingo's cross attention       media_mask(starts, images, tokens)

`experiments/mask_table.py` draws them. A query that may attend to nothing attends evenly to all.
"""

import jax.numpy as jnp

from mmjax.types import Array, Bool, Int


def padding_mask(valid: Bool[Array, "b s"] | Int[Array, "b s"]) -> Bool[Array, "b 1 1 s"]:
    """Which keys are tokens: from an attention mask as tokenizers give it (1 = a token, 0 = padding)."""
    return valid.astype(bool)[:, None, None, :]


def causal_mask(l: int, s: int) -> Bool[Array, "1 1 l s"]:
    """Each query attends to itself and all keys before it. The last query is at the last key (l < s: a cache)."""
    return (jnp.arange(s) <= jnp.arange(l)[:, None] + (s - l))[None, None]


def prefix_mask(prefix: Int[Array, " b"] | int, l: int) -> Bool[Array, "#b 1 l l"]:
    """The first `prefix` tokens attend to each other; later ones to the prefix, themselves and all tokens before them.

    (UniLM's sequence-to-sequence mask, arXiv 1905.03197; T5's prefix LM, arXiv 1910.10683, section 3.2.1.)
    """
    within = jnp.arange(l) < jnp.reshape(jnp.asarray(prefix), (-1, 1))
    return within[:, None, None, :] | causal_mask(l, l)


def matching_mask(n: int, l: int) -> Bool[Array, "1 1 n_l n_l"]:
    """Image-text matching: n queries and the l text tokens after them all attend to each other (BLIP-2, figure 2)."""
    return jnp.ones((1, 1, n + l, n + l), bool)


def grounded_mask(n: int, l: int) -> Bool[Array, "1 1 n_l n_l"]:
    """Image-grounded generation: queries attend to queries, text to the queries and the text so far.

    The text gets the image through the queries, so they are a prefix that does not attend to the text.
    """
    return prefix_mask(n, n + l)


def contrastive_mask(n: int, l: int) -> Bool[Array, "1 1 n_l n_l"]:
    """Image-text contrast: queries attend to queries, text to text, so that neither leaks into the other's features."""
    of_text = jnp.arange(n + l) >= n
    return (of_text[:, None] == of_text)[None, None]


def media_mask(
    starts: Bool[Array, "b l"] | Int[Array, "b l"],
    images: int,
    tokens: int,
    only_last: bool = True,
    earlier: Int[Array, " b"] | int = 0,
) -> Bool[Array, "b 1 l images_tokens"]:
    """The `images`, `tokens` keys each, to which a text token attends (OpenFlamingo, helpers.py:160-235).

    starts: True at the placeholder tokens of images; such a token attends to its own image already.
    only_last: the last image alone, as in all of OpenFlamingo's weights; else every image so far.
    earlier: the number of images before the first token, in a cached prefix.
    """
    images_so_far = images_before(starts, earlier)[:, None, :, None]
    image = 1 + jnp.arange(images * tokens) // tokens
    return image == images_so_far if only_last else image <= images_so_far


def images_before(
    starts: Bool[Array, "b l"] | Int[Array, "b l"], earlier: Int[Array, " b"] | int = 0
) -> Int[Array, "b l"]:
    """The number of images up to each token, itself included; see `media_mask`."""
    return jnp.cumsum(starts.astype(jnp.int32), axis=1) + jnp.reshape(jnp.asarray(earlier, jnp.int32), (-1, 1))
