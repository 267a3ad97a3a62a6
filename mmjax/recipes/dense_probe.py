"""Segmentation of scenes from frozen feature maps, as an evaluation of an image encoder in training.

The protocol is that of `experiments/segment.py --head linear --tune head`, in small: the maps of the training scenes
are computed once, an affine layer on them is trained by AdamW, and the classes of the test scenes' pixels are judged. A
probe of the pooled features judges what an image shows; this one judges what is where.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmjax.data.scenes.sources import SceneMasks
from mmjax.data.scenes.splits import Split
from mmjax.evaluation.features import Extractor
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.segmentation import class_counts, miou_score
from mmjax.models.dense.frozen import MAPS, flat_maps, unflattened
from mmjax.models.dense.network import LinearHead, SegmentationConfig, head_of
from mmjax.models.dense.pyramid import Backbone, resized
from mmjax.models.dense.segment import Segmentation
from mmjax.training.classification import RGB
from mmjax.training.state import Carry
from mmjax.types import Array, ArrayLike, Mean, Params

Variables = Callable[[Params, Any], tuple[Params, Params]]
"""(params, state) -> (parameters, batch statistics) of the encoder by itself."""
TESTS: dict[str, Split] = {"": "validation", "_held_out_sprites": "sprites"}
"""The end of a score's name -> the split that it is of."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationProbe(ScoredEvaluation):
    """`<name>_mIoU` of other scenes of the same sprites, and `<name>_held_out_sprites_mIoU`, in percent.

    Intervals resample images. Chance is that of the background everywhere.

    Attributes:
        backbone: the encoder, without a head.
        variables: see `Variables`.
        mean, std: of its images.
        side: of the scenes, pixels. train, test: numbers of scenes.
        steps, batch_size, learning_rate: of the head's training; the rate falls to 0 by half a cosine.
    """

    name: str = "scenes"
    backbone: Backbone
    variables: Variables
    mean: RGB
    std: RGB
    side: int = 96
    train: int = 600
    test: int = 300
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-2

    @functools.cached_property
    def _scenes(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """split -> (images uint8 [n, side, side, 3], masks uint8 [n, side, side])."""
        sizes: dict[Split, int] = {"train": self.train, **dict.fromkeys(TESTS.values(), self.test)}
        scenes = {}
        for split, n in sizes.items():
            records = [SceneMasks(n, split, size=self.side)[i] for i in range(n)]
            scenes[split] = tuple(np.stack([record[name] for record in records]) for name in ("image", "mask"))
        return scenes

    @functools.cached_property
    def _method(self) -> Segmentation:
        classes = len(SceneMasks(1, size=self.side).classes)
        return Segmentation(SegmentationConfig(self.backbone, classes), self.mean, self.std)

    @functools.cached_property
    def _extractor(self) -> Extractor:
        method, config = self._method, self.backbone
        return Extractor(lambda params, stats, images: flat_maps(config, params, stats, method.pixels(images)), 64)

    def _maps(self, flat: Array) -> list[Array]:
        return unflattened(self.backbone, flat, self.side, self.side)

    @functools.cached_property
    def _fit(self) -> Callable[[Array, Array], Params]:
        method = self._method
        head = head_of(method.config)
        assert isinstance(head, LinearHead)
        optimizer = optax.adamw(optax.cosine_decay_schedule(self.learning_rate, self.steps), weight_decay=0.05)
        empty = Carry({}, {}, {}, {})
        # The loss needs the size of the images alone.
        images = jnp.zeros((self.batch_size, self.side, self.side, 3), jnp.uint8)

        def loss(params: Params, batch: Any) -> Array:
            value, _ = method.loss({"head": params}, empty, batch, jax.random.key(0), jnp.int32(0))
            assert isinstance(value, Mean)
            return value.value

        @jax.jit
        def fit(flat: Array, masks: Array) -> Params:
            start: Any = head.init(jax.random.key(0), self._maps(flat[:1]))["params"]

            def step(carry: Any, key: Array) -> tuple[Any, None]:
                params, state = carry
                chosen = jax.random.randint(key, (self.batch_size,), 0, len(flat))
                gradient = jax.grad(loss)(params, {"image": images, MAPS: flat[chosen], "mask": masks[chosen]})
                updates, state = optimizer.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            keys = jax.random.split(jax.random.key(1), self.steps)
            return jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0]

        return fit

    @functools.cached_property
    def _predict(self) -> Callable[[Params, ArrayLike], Array]:
        head = head_of(self._method.config)

        def predict(params: Params, flat: Array) -> Array:
            logits: Any = head.apply({"params": params}, self._maps(flat))
            return resized(logits, self.side, self.side).argmax(-1).astype(jnp.uint8)

        return jax.jit(predict)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        variables = self.variables(params, state)
        images, masks = self._scenes["train"]
        head = self._fit(jnp.asarray(self._extractor(*variables, images, self.name)), jnp.asarray(masks))
        scores, classes = {}, self._method.config.classes
        for end, split in TESTS.items():
            images, truth = self._scenes[split]
            flat = self._extractor(*variables, images, self.name)
            counts = class_counts(truth, np.asarray(self._predict(head, flat)), classes)
            scores[f"{self.name}{end}_mIoU"] = miou_score(counts)
        return Outcome(scores, {f"{self.name}_n": self.test})
