"""CLIPModel: image and text features, zero-shot classification, retrieval."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mmjax.data.preprocess import ImagePreprocessing
from mmjax.errors import MmjaxError
from mmjax.evaluation.features import batched, similarities
from mmjax.evaluation.zero_shot import TEMPLATES, class_embeddings, prompts
from mmjax.interface.image_classifier import Headless, at_size
from mmjax.interface.image_text import ImageTextModel
from mmjax.interface.inputs import IMAGES_AND_TEXTS, Input, check_ids
from mmjax.interface.model import top_k_labels
from mmjax.models.clip.network import CLIP, CLIPConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.nn.norm import l2_normalize
from mmjax.text.clip_tokenizer import CLIPTokenizer
from mmjax.types import Array, ArrayLike, Float


class CLIPModel(ImageTextModel):
    """A CLIP with its weights; `tokenizer` is a `mmjax.text.clip_tokenizer.CLIPTokenizer`."""

    system: ClassVar[str] = "clip"
    config_class: ClassVar[type] = CLIPConfig

    @classmethod
    def build(cls, config: CLIPConfig) -> nn.Module:
        return CLIP(config)

    @classmethod
    def inputs(cls, config: CLIPConfig) -> Mapping[str, Input]:
        return IMAGES_AND_TEXTS

    @classmethod
    def example(cls, config: CLIPConfig) -> dict[str, jax.ShapeDtypeStruct]:
        side = config.image_size or 64
        return {
            "pixel_values": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
            "input_ids": jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32),
        }

    @classmethod
    def default_preprocess(cls, config: CLIPConfig, layout: str) -> ImagePreprocessing:
        return ImagePreprocessing.clip(config.image_size or 64)

    @classmethod
    def load_tokenizer(cls, file: pathlib.Path) -> CLIPTokenizer | None:
        """tokenizer.json, or Hugging Face's older vocab.json and merges.txt beside where it would be."""
        if file.is_file():
            return CLIPTokenizer.from_file(file)
        vocab, merges = file.with_name("vocab.json"), file.with_name("merges.txt")
        return CLIPTokenizer.from_vocab(vocab, merges) if vocab.is_file() and merges.is_file() else None

    def headless(self, classes: int, size: int | None = None) -> Headless:
        """The image tower, a ViT or a ResNet, without its projection into the common space, as CLIP's linear probes use
        it. Images of another size have its position table interpolated in each call."""
        tower = self.config.tower
        stride = tower.patch if isinstance(tower, ViTConfig) else 32
        if size is not None and size % stride:
            raise MmjaxError(f"images of {size} x {size} cannot be cut in patches: a multiple of {stride} can")
        config = dataclasses.replace(tower, num_classes=classes)
        system = "vit" if isinstance(tower, ViTConfig) else "resnet"
        stats = self.stats.get("vision", {})
        return Headless(system, config, self.params["vision"], stats, at_size(self.preprocess, size))

    # ----------------------------------------------------------------------------------------------------------- arrays

    def outputs(self, variables: Mapping[str, Any], inputs: Mapping[str, Array]) -> dict[str, Any]:
        """image_embeds and text_embeds [b, e] (unit length), logits_per_image, logits_per_text; one of the two alone if
        only pixel_values or input_ids are given.

        vision_model_output, text_model_output: {"last_hidden_state", "pooler_output"}: the last states (before the norm
        of the images, after that of the texts; a ResNet's last feature map), and as in transformers 5 the projected
        features before normalisation. Transformer towers also give hidden_states.
        """
        outputs: dict[str, Any] = {}
        if "pixel_values" in inputs:
            out = self.module.apply(variables, inputs["pixel_values"], method="encode_image")
            outputs["image_embeds"], outputs["vision_model_output"] = l2_normalize(out["embeds"]), _vision_output(out)  # type: ignore[index]
        if "input_ids" in inputs:
            mask = inputs.get("attention_mask")
            out: Any = self.module.apply(variables, inputs["input_ids"], mask, method="encode_text")
            outputs["text_embeds"] = l2_normalize(out["embeds"])
            outputs["text_model_output"] = {"last_hidden_state": out["tokens"], "pooler_output": out["embeds"]}
            outputs["text_model_output"]["hidden_states"] = tuple(out["states"])
        if len(outputs) == 4:
            logits = self._logits(variables["params"], outputs["image_embeds"], outputs["text_embeds"])
            outputs |= {"logits_per_image": logits, "logits_per_text": logits.T}
        return outputs

    @staticmethod
    def _logits(params: Mapping[str, Any], image: Array, text: Array) -> Array:
        logits = jnp.exp(params["logit_scale"].astype(jnp.float32)) * similarities(image, text)
        return logits + params["logit_bias"] if "logit_bias" in params else logits

    @property
    def logit_scale(self) -> float:
        """The factor on the cosines."""
        return float(np.exp(np.asarray(self.params["logit_scale"], np.float32)))

    @functools.cached_property
    def _encoders(self) -> tuple[Any, Any]:
        def image(variables: Any, pixels: Array) -> Array:
            return l2_normalize(self.module.apply(variables, pixels, method="encode_image")["embeds"])  # type: ignore[index]

        def text(variables: Any, ids: Array) -> Array:
            return l2_normalize(self.module.apply(variables, ids, method="encode_text")["embeds"])  # type: ignore[index]

        return jax.jit(image), jax.jit(text)

    # ----------------------------------------------------------------------------------------------- images and strings

    def encode_image(self, images: Any, batch_size: int = 256) -> Float[Array, "b e"]:
        """Unit-norm features of images as `preprocess` takes them, or of pixel values [b, height, width, 3]."""
        return batched(functools.partial(self._encoders[0], self.variables), batch_size, self.pixels(images))

    def id_counts(self) -> Mapping[str, int]:
        return {"input_ids": self.config.text.vocab_size}

    def encode_text(self, texts: str | Sequence[str] | ArrayLike, batch_size: int = 256) -> Float[Array, "b e"]:
        """Unit-norm features of strings, or of ids [b, l]. Raises MmjaxError for strings without a tokenizer."""
        return batched(functools.partial(self._encoders[1], self.variables), batch_size, self._ids(texts))

    def _ids(self, texts: Any) -> Array:
        if isinstance(texts, np.ndarray | jax.Array) and texts.dtype.kind in "iu":
            check_ids({"input_ids": texts}, self.id_counts())
            return jnp.asarray(texts, jnp.int32)
        if self.tokenizer is None:
            raise MmjaxError(
                "this CLIP came without a tokenizer.json: pass ids, or set one: "
                "vlm.replace(tokenizer=CLIPTokenizer.from_merges('bpe_simple_vocab_16e6.txt.gz'))"
            )
        ids = self.tokenizer(texts)
        if int(ids.max(initial=0)) >= self.config.text.vocab_size or ids.shape[1] > self.config.text.context_length:
            text = self.config.text
            raise MmjaxError(
                f"the tokenizer (vocabulary {self.tokenizer.vocab_size}, length {ids.shape[1]}) does not fit the model "
                f"({text.vocab_size}, {text.context_length})"
            )
        return jnp.asarray(ids)

    def classify(
        self,
        images: Any,
        labels: Sequence[str | Sequence[str]],
        templates: Sequence[str] = TEMPLATES,
        top: int = 5,
    ) -> list[list[tuple[str, float]]]:
        """The most probable labels of each image with their probabilities, the best first.

        labels: a name a class, or several names each, of which the first is returned. templates: each with a {} for the
        name; features are averaged over them.
        Raises MmjaxError for a single string, no label, or a template without {}.
        """
        texts, owners = prompts(labels, templates)
        classes = class_embeddings(self.encode_text(texts), owners, len(labels))
        logits = self._logits(self.params, self.encode_image(images), classes)
        names = [label if isinstance(label, str) else label[0] for label in labels]
        return top_k_labels(jax.nn.softmax(logits), names, top)


def _vision_output(out: Any) -> dict[str, Any]:
    if "states" in out:
        states = tuple(out["states"])
        return {"last_hidden_state": states[-1], "pooler_output": out["embeds"], "hidden_states": states}
    return {"last_hidden_state": out[max(name for name in out if name.startswith("C"))], "pooler_output": out["embeds"]}
