"""The base of ALBEF's recipes on two frozen encoders: network, method, initial weights, evaluations."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mmjax.data.openmoji import ATTRIBUTION
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.evaluation.rerank import RerankEvaluation
from mmjax.evaluation.retrieval import RetrievalEvaluation
from mmjax.evaluation.two_stage import TwoStages
from mmjax.models import SYSTEMS
from mmjax.models.albef.cached import CachedAlbef, frozen_rules
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.aligned_start import aligned_projections, translated_attention, translation
from mmjax.recipes.encoder_states import MEAN, STD, EncoderStates
from mmjax.training.experiment import Evaluation, LoadWeights, save_tokenizer
from mmjax.training.initial_parts import initial_parts
from mmjax.training.optimizer import Optimizer, adamw, warmup_cosine
from mmjax.training.partition import Partition
from mmjax.types import Float, Params


@dataclasses.dataclass(frozen=True)
class FrozenAlbef(EncoderStates):
    """A run of minutes on two cores. Copies of the text encoder's last layers, with cross attention, are the multimodal
    encoder.

    Attributes:
        alignment_steps: see `aligned_projections`.
        fusion: multimodal layers.
        queue: keys of earlier batches, a multiple of the batch.
        momentum: of the momentum copies, for a shorter run than the paper's.
        alpha: the momentum copies' share of the targets; it rises over `alpha_steps` batches.
        uniform_steps: see `mmjax.training.image_text.Alignment`.
        learning_rate: of what is new. layers_learning_rate: of copies of pre-trained layers. aligned_learning_rate: of
            the projections and the temperature. At the rate of the rest, features that are aligned already forget in
            a hundred steps half of what they can.
        k: drawings or names that the ITM head scores for each query.
    """

    ramps: ClassVar[tuple[str, ...]] = ("warmup", "alpha_steps", "uniform_steps")

    steps: int = 600
    alignment_steps: int = 300
    fusion: int = 1
    embed_dim: int = 256
    queue: int = 512
    momentum: float = 0.99
    alpha: float = 0.2
    alpha_steps: int = 100
    uniform_steps: int = 300
    learning_rate: float = 1e-3
    layers_learning_rate: float = 3e-4
    aligned_learning_rate: float = 5e-5
    warmup: int = 20
    weight_decay: float = 0.05
    k: int = 16

    @property
    def network(self) -> AlbefConfig:
        """With the ITM head."""
        depth = self.text_encoder[0].depth
        text = dataclasses.replace(self.text_encoder[0], depth=depth + self.fusion, cross_from=depth, pooler=False)
        fields = {"embed_dim": self.embed_dim, "queue": self.queue, "momentum": self.momentum, "alpha": self.alpha}
        return AlbefConfig(self.image_encoder[0], text, by_image=True, **fields)

    def method(self) -> CachedAlbef:
        ramps = {"alpha_steps": self.alpha_steps, "uniform_steps": self.uniform_steps}
        return CachedAlbef(self.network, mean=MEAN, std=STD, side=self.image_size, **ramps)

    def optimizer(self) -> Optimizer:
        def adam(peak: float) -> Any:
            return adamw(warmup_cosine(peak, self.steps, self.warmup), self.weight_decay)

        copies = ("attention", "norm_1", "norm_2", "mlp")
        layers = dict.fromkeys((f"text/encoder/*/{part}/**" for part in copies), "layers")
        aligned = dict.fromkeys(("vision_proj/**", "text_proj/**", "temperature"), "aligned")
        rules = {**frozen_rules(self.text_encoder[0].depth), **layers, **aligned}
        rates = {
            "trainable": self.learning_rate,
            "layers": self.layers_learning_rate,
            "aligned": self.aligned_learning_rate,
        }
        return Optimizer({label: adam(rate) for label, rate in rates.items()}, Partition(rules))

    # ------------------------------------------------------------------------------------------------ initial weights

    def init_sources(self) -> tuple[str, ...]:
        """Random encoders are a source too: the multimodal layers and the projections begin from their states."""
        return super().init_sources() or ("random encoders",)

    def initial_weights(self, load: LoadWeights) -> Mapping[str, Any]:
        """The encoders; multimodal layers as copies of the text's last ones, whose cross attention is a copy of their
        self attention over translated image tokens; and projections. See `mmjax.recipes.aligned_start`."""
        vision, text = self.init_vision or "random images", self.init_text or "random texts"
        indices = [list(self.source.columns[name]) for name in ("pictures", "captions")]
        images, texts = (x[:, 0].astype(np.float32) for x in (self.states.images, self.states.texts))
        first = [[choices[0] for choices in column] for column in indices]
        affine = translation(images[first[0]], texts[first[1]])
        params = self.text_encoder[1]
        sources = {vision: self.image_encoder[1], text: {**params, "encoder": self._with_copies(params, affine)}}
        model = next(system.model for system in SYSTEMS if system.name == "albef")
        expected = model.shapes(self.network)["params"]
        weights = initial_parts(lambda name: {"params": sources[name]}, expected, self.network.vision, vision, text)
        projections = aligned_projections(
            (images, texts), (indices[0], indices[1]), self.embed_dim, self.alignment_steps, self.seed
        )
        return {**weights, "params": {**weights["params"], **projections}}

    def _with_copies(self, params: Params, affine: Any) -> dict[str, Any]:
        """The blocks of the text encoder, and the multimodal ones."""
        encoder = dict(params["encoder"])
        depth = len(encoder)
        for i in range(depth, depth + self.fusion):
            block = encoder[f"block_{i - self.fusion}"]
            cross = translated_attention(block["attention"], *affine)
            encoder[f"block_{i}"] = {**block, "cross_attention": cross, "cross_norm": block["norm_1"]}
        return encoder

    # ----------------------------------------------------------------------------------------------------- evaluation

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Retrieval on the held-out names: by the features, and with an ITM head by it on the nearest of them ("itm"),
        and by the sum of its logit and the contrast's ("sum")."""
        columns = self.drawings.held_out.columns
        pictures, names = np.asarray(columns["image"]), list(columns["text"])
        return self.retrieval("", self.encode_images(pictures), names, pictures)

    def training_evaluations(self) -> tuple[Evaluation, ...]:
        """The same on as many training names, as "train_features", "train_itm" and "train_sum"."""
        columns = self.drawings.train.columns
        things = np.random.default_rng(0).permutation(len(columns["text"]))[: len(self.drawings.held_out)]
        states = self.states.images[[self.pairs.images[thing][0] for thing in things]]
        names = [str(columns["text"][thing]) for thing in things]
        return self.retrieval("train_", states, names, np.asarray(columns["image"])[things])

    def retrieval(
        self, prefix: str, images: Float[np.ndarray, "n t d"], names: list[str], pictures: np.ndarray
    ) -> tuple[Evaluation, ...]:
        """The evaluations of pairs of images, as states, and names."""
        method, texts = self.method(), self.caption_columns(names)
        every: dict[str, Any] = {"final_step": self.steps}
        if not prefix:
            every |= {"captions": names, "thumbnails": pictures, "attribution": ATTRIBUTION}
        features = RetrievalEvaluation(
            name=f"{prefix}features",
            encode_image=method.encode_image,
            encode_text=method.encode_text,
            images=images,
            texts=texts,
            **every,
        )
        if not self.network.matching:
            return (features,)
        stages = TwoStages(method.head, method.pixels)

        def first(params: Params, state: Any) -> tuple[Any, Any]:
            """The contrast's logits, and the states of all images and texts."""
            cosines, states = stages.first(images, texts, params)
            return cosines / params["temperature"], states

        reranking = RerankEvaluation(
            name=f"{prefix}itm",
            reranker=stages.reranker(self.k, add_similarity=False),
            first=first,
            sum_name=f"{prefix}sum",
            **every,
        )
        return features, reranking

    def model(self) -> tuple[str, AlbefConfig]:
        return "albef", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        """The tokenizer, and the image preprocessing."""
        size = (self.image_size, self.image_size)
        preprocess = ImagePreprocessing(size, None, resample="bicubic", mean=MEAN, std=STD)
        return save_tokenizer(self.tokenizer, workdir) | {"preprocess": dataclasses.asdict(preprocess)}
