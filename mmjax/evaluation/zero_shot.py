"""Zero-shot classification: an image's class is the one whose description is nearest (CLIP; open_clip's classifier).

>>> texts, text_class = prompts(["cat", ("happy", "smiling")], ["a photo of a {}."])
>>> texts
['a photo of a cat.', 'a photo of a happy.', 'a photo of a smiling.']
>>> embeddings = class_embeddings(np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]]), text_class)
>>> zero_shot_logits(np.array([[0.2, 2.0]]), embeddings).argmax(1).tolist()
[1]
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.evaluation.classification import confusion, mean_per_class, top_k
from mmjax.evaluation.features import Encode, Extractor, Inputs, checked_features, checked_integers
from mmjax.evaluation.pictures import confusion_picture
from mmjax.evaluation.protocol import Outcome, ScoredEvaluation
from mmjax.evaluation.report import Score
from mmjax.nn.norm import l2_normalize
from mmjax.types import Array, ArrayLike, Float, Int, MmjaxError, Params

TEMPLATES = ("a photo of a {}.",)
"""The single template of CLIP's README."""
TEMPLATES_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""Seven templates that performed slightly better on ImageNet than CLIP's eighty, according to its authors."""


def prompts(
    classes: Sequence[str | Sequence[str]], templates: Sequence[str] = TEMPLATES
) -> tuple[list[str], Int[np.ndarray, " m"]]:
    """Every name of every class in every template, and the class index of each text.

    classes: one name each, or several (FER2013 has "happy" and "smiling").
    Raises MmjaxError for a single string instead of a list, no class, or a template without {}.
    """
    if isinstance(classes, str):
        raise MmjaxError(f"classes: {classes!r} is one string; a list has one name for each class")
    for template in templates:
        if template.count("{}") != 1:
            raise MmjaxError(f"templates: {template!r} needs one {{}} for the name")
    names = [(name,) if isinstance(name, str) else tuple(name) for name in classes]
    if not names or not templates or not all(names):
        raise MmjaxError(f"classes: {len(names)} classes and {len(templates)} templates; each class needs a name")
    texts = [template.format(name) for several in names for name in several for template in templates]
    owners = [label for label, several in enumerate(names) for _ in range(len(several) * len(templates))]
    return texts, np.array(owners, np.int32)


@functools.partial(jax.jit, static_argnames="classes")
def _class_means(features: Float[Array, "m d"], text_class: Int[Array, " m"], classes: int) -> Float[Array, "c d"]:
    return l2_normalize(jax.ops.segment_sum(l2_normalize(features), text_class, classes))


def class_embeddings(
    text_features: Float[ArrayLike, "m d"], text_class: Int[ArrayLike, " m"], classes: int | None = None
) -> Float[Array, "c d"]:
    """A unit vector for each class: the normalised mean of the unit vectors of its texts.

    Raises MmjaxError, naming the argument: invalid features, a class without a text.
    """
    features = checked_features("text_features", text_features)
    owners = checked_integers("text_class", text_class, len(features), classes)
    classes = classes or int(owners.max()) + 1
    without = np.setdiff1d(np.arange(classes), owners)
    if len(without):
        raise MmjaxError(f"text_class: {len(without)} of {classes} classes have no text, class {without[0]} for one")
    return _class_means(features, owners, classes)


@jax.jit
def _cosines(images: Float[Array, "n d"], embeddings: Float[Array, "c d"]) -> Float[Array, "n c"]:
    return jnp.matmul(l2_normalize(images), l2_normalize(embeddings).T, precision="highest")


def zero_shot_logits(
    image_features: Float[ArrayLike, "n d"], embeddings: Float[ArrayLike, "c d"], scale: float = 100.0
) -> Float[Array, "n c"]:
    """scale x cosine; with the model's logit scale, softmax over the classes gives its probabilities."""
    images = checked_features("image_features", image_features)
    return scale * _cosines(images, checked_features("embeddings", embeddings, images.shape[1]))


def zero_shot_scores(
    image_features: Float[ArrayLike, "n d"],
    labels: Int[ArrayLike, " n"],
    embeddings: Float[ArrayLike, "c d"],
    ks: tuple[int, ...] = (1, 5),
) -> dict[int, Score]:
    """k -> top-k accuracy; see `mmjax.evaluation.classification.top_k`."""
    return top_k(zero_shot_logits(image_features, embeddings), labels, ks)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ZeroShotEvaluation(ScoredEvaluation):
    """`zero_shot_top1`, `zero_shot_top5` and `zero_shot_mean_per_class` of a two-tower model; a confusion picture.

    Attributes:
        encode_image, encode_text: (params, state, inputs [b, ...]) -> features [b, d].
        images, labels: an array [n, ...] and int [n], or a pipeline, which contains labels.
        texts: an array [m, ...] or a dict of arrays: the tokens of `prompts(classes, templates)[0]`.
        text_class: int [m], `prompts(...)[1]`.
        class_names: for the picture; None: no picture.
    """

    name: str = "zero_shot"
    encode_image: Encode
    encode_text: Encode
    images: Inputs
    labels: Int[ArrayLike, " n"] | None = None
    texts: ArrayLike | Mapping[str, ArrayLike]
    text_class: Int[ArrayLike, " m"]
    ks: tuple[int, ...] = (1, 5)
    class_names: Sequence[str] | None = None
    attribution: str | None = None
    batch_size: int = 256

    @functools.cached_property
    def _extractors(self) -> tuple[Extractor, Extractor]:
        return Extractor(self.encode_image, self.batch_size), Extractor(self.encode_text, self.batch_size)

    def evaluate(self, params: Params, state: Any, pictures: bool = True) -> Outcome:
        image, text = self._extractors
        embeddings = class_embeddings(text(params, state, self.texts, "texts"), self.text_class)
        features, labels = image.labelled(params, state, self.images, self.labels, "images")
        logits = np.asarray(zero_shot_logits(features, embeddings))
        scores = {f"{self.name}_top{k}": score for k, score in top_k(logits, labels, self.ks).items()}
        predicted, n, classes = logits.argmax(1), *logits.shape
        scores[f"{self.name}_mean_per_class"] = mean_per_class(predicted, labels, classes)
        figures = {}
        if pictures and self.class_names is not None:
            matrix = confusion(predicted, labels, classes)
            figures[f"{self.name}_confusion"] = confusion_picture(matrix, self.class_names, self.attribution)
        return Outcome(scores, {f"{self.name}_n": n}, figures)
