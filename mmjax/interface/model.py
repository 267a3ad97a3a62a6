"""Model, the base of what `mmjax.load` returns: a network with its weights, tokenizer and preprocessing."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.interface.inputs import Input, check_ids, check_inputs
from mmjax.interface.summary import summary
from mmjax.types import Array, ArrayLike, Params

LENGTHS = 16
"""Texts are padded to multiples of this many tokens, so that few shapes are compiled."""


ABILITIES = (
    *("classify", "match", "retrieve", "ground", "segment", "detect", "caption", "answer", "chat", "generate"),
    *("translate", "fill_mask", "tag", "classify_pairs", "encode_image", "encode_text"),
)
"""The methods that a model may have besides `forward`."""


@dataclasses.dataclass(repr=False)
class Model(abc.ABC):
    """A loaded system. Subclasses build its module and define what `forward` returns.

    Attributes:
        config: the system's frozen config dataclass.
        params: nested dict of parameters.
        stats: nested dict of batch statistics; empty where there are none.
        tokenizer: texts -> ids; None where the weights came without one.
        preprocess: images -> pixel values, as the checkpoint's layout prescribes.
        layout: the name of the layout that the weights were read from; "mmjax" for our own.
        labels: the names of the head's classes, in their order; of a model without a head, the names that `classify`
            chooses from by default; () if there are none.
        notes: the assumptions made when the weights were loaded, because no file determines them; a sentence each.
        module: the Flax module.
    """

    system: ClassVar[str]
    config_class: ClassVar[type]
    classified: ClassVar[Literal["image", "text"]] = "image"
    """The input of `classify`, if there is one."""
    int8_channels: ClassVar[Mapping[str, int]] = {}
    """Globs of the parameters that may be stored in int8 (see `mmjax.nn.int8`), and the axis of each one's channels."""

    config: Any
    params: Params
    stats: Params = dataclasses.field(default_factory=dict)
    tokenizer: Any = None
    preprocess: ImagePreprocessing = dataclasses.field(default_factory=ImagePreprocessing)
    layout: str = "mmjax"
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    # ------------------------------------------------------------------------------------------- defined by subclasses

    @classmethod
    @abc.abstractmethod
    def build(cls, config: Any) -> nn.Module:
        """The module of a config."""

    @classmethod
    @abc.abstractmethod
    def inputs(cls, config: Any) -> Mapping[str, Input]:
        """The inputs of `forward`, by transformers' names."""

    @classmethod
    @abc.abstractmethod
    def example(cls, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Inputs of `outputs` that the module can be initialised with: by name, batch 1."""

    @abc.abstractmethod
    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Everything that `forward` returns, as a pure function."""

    def id_counts(self) -> Mapping[str, int]:
        """The number of ids that exist, for each input of ids."""
        return {}

    @classmethod
    def folder_fields(cls, folder: pathlib.Path) -> dict[str, Any]:
        """Fields of the config that other files beside the weights determine."""
        return {}

    @classmethod
    def default_preprocess(cls, config: Any, layout: str) -> ImagePreprocessing:
        """The preprocessing of a layout whose files do not define it."""
        return ImagePreprocessing()

    @classmethod
    def num_classes(cls, config: Any) -> int:
        """The number of classes of the head; 0 without one."""
        return getattr(config, "num_classes", 0)

    @classmethod
    def default_labels(cls, config: Any) -> tuple[str, ...]:
        """The names of the classes where no file lists them; () if they are not published."""
        return ()

    def class_names(self, labels: Sequence[str] | None = None) -> list[str]:
        """The names of the head's classes, in their order.

        labels: names to use instead of the model's. A class without a name is named by its number.
        Raises MmjaxError for another number of names than classes.
        """
        n = self.num_classes(self.config)
        if labels is None:
            return list(self.labels or self.default_labels(self.config)) or [str(i) for i in range(n)]
        if len(labels) != n:
            raise MmjaxError(f"labels: {len(labels)} names for the {n} classes of the head")
        return list(labels)

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> Any:
        """The tokenizer in a tokenizer.json, None if there is no such file."""
        return tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None

    def save_tokenizer(self, file: pathlib.Path) -> bool:
        """Writes the tokenizer, if there is one; returns whether there is."""
        if self.tokenizer is not None:
            self.tokenizer.save(str(file))
        return self.tokenizer is not None

    # ----------------------------------------------------------------------------------------------------------- shared

    @functools.cached_property
    def module(self) -> nn.Module:
        return self.build(self.config)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables for the module's `apply`."""
        return {"params": self.params} | ({"batch_stats": self.stats} if self.stats else {})

    @classmethod
    def shapes(cls, config: Any) -> dict[str, Any]:
        """{"params", "stats"}: shapes and dtypes of the variables of a config, without computing them."""
        module, inputs = cls.build(config), cls.example(config)
        variables = jax.eval_shape(
            lambda rng, values: module.init(rng, *values), jax.random.key(0), tuple(inputs.values())
        )
        shapes = {"params": variables["params"], "stats": variables.get("batch_stats", {})}
        return {name: tree for name, tree in shapes.items() if tree}

    def weights(self) -> dict[str, Any]:
        """The initial weights of a run that starts from this model: see `mmjax.training.experiment.LoadWeights`."""
        return {"params": self.params, "stats": self.stats}

    def for_layout(self, layout: str) -> Self:
        """The model as an export in this layout writes it."""
        return self

    def headless(self, classes: int, size: int | None = None) -> Any:
        """An `mmjax.interface.image_classifier.Headless`: this image encoder before a new head of `classes` classes.

        size: side of its images; None: that of `preprocess`.
        Raises MmjaxError for a model without an image encoder, or one that cannot take images of that size.
        """
        raise MmjaxError(f"{self.system} has no image encoder that could be made a classifier")

    def replace(self, **fields: Any) -> Self:
        """The same model with other fields: `vlm.replace(params=tuned)`."""
        return dataclasses.replace(self, **fields)

    @property
    def abilities(self) -> tuple[str, ...]:
        """The `ABILITIES` that this model has; a subclass leaves out those for which it has no head."""
        return tuple(name for name in ABILITIES if hasattr(type(self), name))

    def __repr__(self) -> str:
        inputs = self.inputs(self.config)
        return summary(type(self).__name__, self.layout, self.config, self.params, inputs, self.abilities)

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.outputs)

    def forward(
        self,
        pixel_values: ArrayLike | None = None,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        **others: ArrayLike | None,
    ) -> dict[str, Array]:
        """The network on preprocessed arrays; compiled once for each shape.

        `inputs` declares which inputs a system takes, and their axes; all have transformers' names.
        pixel_values: float32, channels last. input_ids: int [b, l]. attention_mask: int or bool [b, l], 1 = a token.
        others: token_type_ids, decoder_input_ids (the start token first), decoder_attention_mask, ...
        Returns transformers' names and shapes; feature maps are [b, height, width, c].
        Raises MmjaxError for an input that the system does not take, a missing one, wrong ranks or dtypes, and ids that
        do not exist.
        """
        values = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask, **others}
        inputs = check_inputs(self.inputs(self.config), values, self.system)
        check_ids(values, self.id_counts())
        return dict(self._compiled(self.variables, inputs))

    def pixels(self, images: Any) -> Array:
        """Images as `preprocess` takes them -> pixel values [b, height, width, 3]; float arrays of rank 4, and of
        rank 5 (tiles, frames of videos), are ready."""
        if isinstance(images, jax.Array):
            images = np.asarray(images)
        if isinstance(images, np.ndarray) and images.ndim in (4, 5) and images.dtype != np.uint8:
            return jnp.asarray(images)
        return jnp.asarray(self.preprocess(images))


def top_k_labels(scores: Array, names: list[str], top: int) -> list[list[tuple[str, float]]]:
    """For each row of scores [b, c] the `top` highest with the names of their columns, the highest first."""
    values, indices = jax.lax.top_k(scores, min(top, scores.shape[1]))
    return [[(names[i], p) for i, p in zip(*row)] for row in zip(indices.tolist(), values.tolist())]
