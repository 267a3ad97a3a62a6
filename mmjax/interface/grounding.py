"""GroundingModel, the base of models that show where in an image a text is: Grad-CAM on cross attention."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.evaluation.features import batched
from mmjax.evaluation.grounding import Box, box_scores, densest_box, resized
from mmjax.interface.two_stage import TwoStageModel
from mmjax.types import Array, ArrayLike, Float


@dataclasses.dataclass(frozen=True)
class GroundingRules:
    """How a system's original computes Grad-CAM.

    Attributes:
        block: the layer whose cross attention is used, counted from 0.
        words_only: the map is the mean over the words alone; otherwise over [CLS] and [SEP] too.
    """

    block: int
    words_only: bool


class Grounding(NamedTuple):
    """Where a text is in its image.

    heat: float32 [height, width], at the size of the image, in [0, 1]. box: (x, y, width, height) in pixels.
    probability: that the text belongs to the image. cam: float32 [rows, columns], the map of the patches as computed.
    """

    heat: np.ndarray
    box: Box
    probability: float
    cam: np.ndarray


class GroundingModel(TwoStageModel):
    """Heat maps and boxes of texts, for a network with an ITM head whose cross attention is at `cross_attends`.

    Source: ALBEF Grounding.py:69-101; LAVIS blip_image_text_matching.py, compute_gradcam.
    """

    grounding_rules: ClassVar[GroundingRules]
    cross_attends: ClassVar[str] = "text/encoder"
    """The path of the stack with cross attention to the image; its first name is that of its config."""

    @property
    def abilities(self) -> tuple[str, ...]:
        return tuple(name for name in super().abilities if name != "ground" or self.config.matching)

    def ground(
        self,
        images: Any,
        texts: str | Sequence[str],
        proposals: Sequence[ArrayLike] | ArrayLike | None = None,
        block: int | None = None,
        batch_size: int = 8,
    ) -> Any:
        """Where the i-th text is in the i-th image; of one image and one string a `Grounding`, else a list of them.

            model.ground(image, "the red car").box             # (113.0, 40.0, 96.0, 64.0)

        proposals: boxes [k, 4] (x, y, width, height) of each image, or of the one image, to choose from; None: the box
            of patches with the most heat for its size, see `mmjax.evaluation.grounding.densest_box`.
        block: see `heat_maps`.
        Raises MmjaxError for a network without an ITM head, unless there is one text, and one list of proposals, for
        each image, for a block without cross attention, or a preprocessing that crops images.
        """
        alone = isinstance(texts, str)
        if alone:
            images, texts = images if _are_pixels(images) else [images], [texts]
            proposals = None if proposals is None else [np.asarray(proposals)]
        sizes = self._sizes(images)
        maps, logits = self.heat_maps(images, texts, block, batch_size)
        if proposals is not None and len(proposals) != len(maps):
            raise MmjaxError(f"proposals: {len(proposals)} lists of boxes for {len(maps)} images")
        probabilities = np.asarray(jax.nn.softmax(logits)[:, 1])
        results = []
        for index, (cam, size) in enumerate(zip(np.asarray(maps), sizes)):
            box = densest_box(cam, size)
            if proposals is not None and len(boxes := np.asarray(proposals[index], np.float64)):
                box = tuple(boxes[int(np.argmax(box_scores(cam, size, boxes)))].tolist())
            results.append(Grounding(resized(cam, size), box, float(probabilities[index]), cam))
        return results[0] if alone else results

    def heat_maps(
        self, images: Any, texts: Sequence[str] | ArrayLike, block: int | None = None, batch_size: int = 8
    ) -> tuple[Float[Array, "b rows columns"], Float[Array, "b 2"]]:
        """The Grad-CAM of the i-th text in the i-th image, [b, rows, columns] of patches; and the ITM logits [b, 2].

        The mean, over heads and `map_rows`, of the weights of a layer's cross attention times the positive part of
        their gradient, that of the ITM logit of class 1.
        block: see `grounding_block`.
        """
        self._check_matching()
        block = self.grounding_block(block)
        columns, pixels = self.columns(texts), self.pixels(images)
        if len(pixels) != len(columns[0]):
            raise MmjaxError(f"{len(pixels)} images for {len(columns[0])} texts")
        run = functools.partial(self._compiled_cam, self.variables, block)
        return batched(run, batch_size, *columns, pixels)

    def grounding_block(self, block: int | None = None) -> int:
        """The layer of `heat_maps`, from 0; None: the original's, or the last but one of a smaller network.

        Raises MmjaxError for one whose cross attention gives no map.
        """
        text, rules = self.text_config, self.grounding_rules
        # The ITM head reads the first token: in the last layer the words have no gradient.
        first, last = text.cross_from or 0, text.depth - 1 - rules.words_only
        chosen = max(min(rules.block, text.depth - 2), first) if block is None else block
        if not first <= chosen <= last:
            raise MmjaxError(f"block={chosen}: layers whose cross attention gives a map are {first} to {last}")
        return chosen

    @functools.cached_property
    def _compiled_cam(self) -> Callable[..., tuple[Array, Array]]:
        return jax.jit(self._cam, static_argnums=1)

    def _cam(
        self, variables: Mapping[str, Any], block: int, ids: Array, mask: Array, pixels: Array
    ) -> tuple[Array, Array]:
        # Rematerialised blocks would not pass the gradient on.
        part = self.cross_attends.split("/")[0]
        plain: Any = {part: dataclasses.replace(getattr(self.config, part), remat=False)}
        module = self.build(dataclasses.replace(self.config, **plain))
        path = f"{self.cross_attends}/block_{block}/cross_attention/weights"
        image_states = self.apply(variables, "encode_image", pixels)
        inputs = ids, mask, self.apply(variables, "encode_text", ids, mask), image_states

        def score(zeros: Array) -> tuple[Array, tuple[Array, Array]]:
            perturbed = {**variables, "perturbations": tree.unflatten({path: zeros})}
            states, stored = module.apply(perturbed, *inputs, method="encode_pair", mutable=["intermediates"])
            logits = self.apply(variables, "itm_logits", states)
            [weights] = tree.flatten(stored["intermediates"])[path]
            return jnp.sum(logits[:, 1]), (weights, logits)

        counted = self.map_rows(mask)
        zeros = jnp.zeros((len(ids), self.text_config.heads, counted.shape[1], image_states.shape[1]))
        gradients, (weights, logits) = jax.grad(score, has_aux=True)(zeros)
        heat = jnp.mean(weights * jax.nn.relu(gradients), axis=1)[:, :, 1:]  # without the class token
        heat = jnp.einsum("bln,bl->bn", heat, counted) / jnp.maximum(counted.sum(1, keepdims=True), 1)
        rows, columns = (side // self.config.vision.patch for side in pixels.shape[1:3])
        return heat.reshape(-1, rows, columns), logits

    def map_rows(self, mask: Array) -> Float[Array, "b r"]:
        """1 for the rows of the cross attention that a map is the mean of, the tokens' here; 0 for the others."""
        counted = mask == 1
        if self.grounding_rules.words_only:
            positions, lengths = jnp.arange(mask.shape[1]), mask.sum(1, keepdims=True)
            counted = (positions > 0) & (positions < lengths - 1)
        return counted.astype(jnp.float32)

    def _sizes(self, images: Any) -> list[tuple[int, int]]:
        """(height, width) of each image. Raises MmjaxError where the network does not see all of it."""
        if _are_pixels(images):
            return [(images.shape[1], images.shape[2])] * len(images)
        if self.preprocess.crop is not None or self.preprocess.pad:
            raise MmjaxError("ground: the preprocessing crops or pads images, so that a map does not cover them")
        return [
            (int(height), int(width))
            for height, width in self.preprocess.image_sizes(
                np.asarray(images) if isinstance(images, jax.Array) else images
            )
        ]


def _are_pixels(images: Any) -> bool:
    """Whether images are pixel values already: floats [b, height, width, 3]."""
    return isinstance(images, np.ndarray | jax.Array) and images.ndim == 4 and images.dtype != np.uint8
