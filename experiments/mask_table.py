"""The attention masks of the lineage as one picture: rows are queries, columns keys, a dark cell means "may attend".

python experiments/mask_table.py masks.png
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mmjax.evaluation.pictures import pixels, png
from mmjax.nn import masks

ALLOWED, FORBIDDEN = (33, 96, 158), (232, 236, 240)
TEXT, PADDING = 5, 1
QUERIES, IMAGES, TOKENS = 3, 2, 2


@dataclasses.dataclass(frozen=True)
class Panel:
    """A mask [l, s] with a name for each of its queries and keys."""

    title: str
    formula: str
    mask: np.ndarray
    queries: Sequence[str]
    keys: Sequence[str]


def panels() -> list[Panel]:
    """One panel a mask, in the order of the systems that introduced them; the last token of padded texts is padding."""
    words = [f"t{i}" for i in range(1, TEXT + 1)]
    padded = [*words[:-PADDING], *["pad"] * PADDING]
    queries_and_words = [f"q{i}" for i in range(1, QUERIES + 1)] + words
    images = [f"{name}{i}" for name in "ab"[:IMAGES] for i in range(1, TOKENS + 1)]
    story = ["t1", "<a>", "t2", "<b>", "t3"]
    valid = masks.padding_mask(jnp.arange(TEXT)[None] < TEXT - PADDING)
    causal = masks.causal_mask(TEXT, TEXT)
    starts = jnp.array([[token.startswith("<") for token in story]])
    made = [
        ("encoder", "padding_mask", valid, padded, padded),
        ("decoder", "causal_mask", causal, words, words),
        ("encoder-decoder cross", "padding_mask", valid, ["y1", "y2", "y3"], padded),
        ("decoder over padding", "causal_mask & padding_mask", causal & valid, padded, padded),
        ("prefix of 2", "prefix_mask", masks.prefix_mask(2, TEXT), words, words),
        (
            "Q-Former: matching",
            "matching_mask",
            masks.matching_mask(QUERIES, TEXT),
            queries_and_words,
            queries_and_words,
        ),
        (
            "Q-Former: grounded generation",
            "grounded_mask",
            masks.grounded_mask(QUERIES, TEXT),
            queries_and_words,
            queries_and_words,
        ),
        (
            "Q-Former: contrast",
            "contrastive_mask",
            masks.contrastive_mask(QUERIES, TEXT),
            queries_and_words,
            queries_and_words,
        ),
        ("Flamingo: the last image", "media_mask", masks.media_mask(starts, IMAGES, TOKENS), story, images),
    ]
    return [
        Panel(title, formula, _whole(mask, queries, keys), queries, keys)
        for title, formula, mask, queries, keys in made
    ]


def _whole(mask: Any, queries: Sequence[str], keys: Sequence[str]) -> np.ndarray:
    """The mask of the first example, broadcast to every query."""
    return np.broadcast_to(np.asarray(mask)[0, 0], (len(queries), len(keys)))


def draw(examples: Sequence[Panel], columns: int = 3) -> np.ndarray:
    """The panels as one picture, uint8 [height, width, 3]."""
    rows = -(-len(examples) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.7 * rows), dpi=100, layout="constrained")
    for position, panel in enumerate(examples, 1):
        axes = figure.add_subplot(rows, columns, position)
        colours = np.where(panel.mask[..., None], np.asarray(ALLOWED, np.uint8), np.asarray(FORBIDDEN, np.uint8))
        axes.imshow(colours, interpolation="nearest")
        axes.set_title(f"{panel.title}\n{panel.formula}", fontsize=9)
        axes.set_xticks(range(len(panel.keys)), panel.keys, fontsize=8)
        axes.set_yticks(range(len(panel.queries)), panel.queries, fontsize=8)
        axes.set_xticks(np.arange(len(panel.keys) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(panel.queries) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.set_xlabel("keys", fontsize=8)
        axes.set_ylabel("queries", fontsize=8)
    return pixels(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=pathlib.Path, help="the picture to be written, a .png")
    flags = parser.parse_args()
    flags.target.write_bytes(png(draw(panels())))
    print(flags.target)


if __name__ == "__main__":
    main()
