"""The base of small recipes of ALBEF on scenes: their sizes, and one tokenizer for all texts about scenes."""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from mmjax.data.scenes.language import name, short_caption
from mmjax.data.scenes.sources import SceneReferring, SceneStatements
from mmjax.data.scenes.splits import Split, held_out_sprites
from mmjax.data.scenes.sprites import SPRITES
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.small_image_text import SmallImageText
from mmjax.text.captions import albef_caption

POSITIONS = 24
"""As many as the longest text about a scene, or about two of them, needs."""
SAMPLES = 500
"""Scenes, and pairs of them, from whose texts the tokenizer learns the words beside the sprites' names."""


@dataclasses.dataclass(frozen=True)
class AlbefScenes(SmallImageText, abc.ABC):
    """From random weights. All have one tokenizer and as many positions, so that one starts from another (`init_from`).

    Attributes:
        scenes, test_scenes: numbers of training records, and of records of each evaluated split.
        splits: those that are evaluated, see `mmjax.data.scenes.splits`.
    """

    clean = staticmethod(albef_caption)
    sep: ClassVar[bool] = False
    unit: ClassVar[str] = "pairs"

    batch_size: int = 64
    width: int = 96
    vision_depth: int = 2
    head_width: int = 32
    dropout: float = 0.0
    positions: Literal["learned", "moco_v3"] = "moco_v3"
    scenes: int = 1_000_000
    test_scenes: int = 200
    splits: tuple[Split, ...] = ("validation", "sprites", "pairs")

    def tokenizer_texts(self) -> Iterator[str]:
        """The names of the sprites that are not held out, and sampled texts."""
        for sprite in SPRITES:
            if sprite.index not in held_out_sprites():
                yield from (name(sprite.index), name(sprite.index, plural=True)) * 2
        referring, statements = SceneReferring(SAMPLES), SceneStatements(SAMPLES)
        for index in range(SAMPLES):
            scene, expression, _ = referring.example(index)
            yield from (short_caption(scene), str(expression), statements.example(index).text)

    @property
    def text_sizes(self) -> dict[str, Any]:
        return super().text_sizes | {"positions": POSITIONS}

    @property
    @abc.abstractmethod
    def network(self) -> AlbefConfig: ...

    def model(self) -> tuple[str, AlbefConfig]:
        return "albef", self.network
