"""CLIP ViT-B/16 as published (arXiv 2103.00020, section 2.5): 32 epochs of 400 M pairs in batches of 32,768.

    mmjax plan experiments/clip_b16.py --topology v5e:8x8        # what it takes, without data or devices
    mmjax train experiments/clip_b16.py --data "gs-mount/pairs-{00000..41407}.tar" --merges bpe_simple_vocab_16e6.txt.gz

Data: WebDataset tars of images and captions. The vocabulary is OpenAI's file, which open_clip's wheel holds
(`pip download --no-deps open-clip-torch`). On fewer chips: `--chunks 4` (the same gradient from quarters of the batch,
one after another), a smaller `--batch-size`, or both.
"""

import dataclasses
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mmjax.data.pipeline import Pipeline
from mmjax.data.transforms import EncodeText, RandomResizedCrop
from mmjax.data.webdataset import WebDataset
from mmjax.errors import MmjaxError
from mmjax.models.clip.network import CLIPConfig
from mmjax.models.clip.pretrain import CLIP
from mmjax.text.clip_tokenizer import CLIPTokenizer
from mmjax.training.experiment import ExperimentConfig
from mmjax.training.optimizer import Optimizer, adamw, warmup_cosine


@dataclasses.dataclass(frozen=True)
class Config(ExperimentConfig):
    """The paper's recipe; adamw_b2 and adamw_eps are its values for ViTs.

    Attributes:
        data: shards: a folder, a pattern, or a range in braces.
        merges: OpenAI's bpe_simple_vocab_16e6.txt.gz.
        weight_decay: of leaves with two axes or more: no gain, bias or logit_scale.
        dtype: of the computation; parameters and moments are float32.
        loss_blocks, chunks: of `mmjax.models.clip.pretrain.CLIP`.
    """

    steps: int = 390_625
    batch_size: int = 32_768
    lift: Literal["jit", "pmap", "mesh"] = "mesh"
    log_every: int = 50
    checkpoint_every: int = 2_000
    workers: int = 16
    data: str = ""
    merges: str = "bpe_simple_vocab_16e6.txt.gz"
    learning_rate: float = 5e-4
    warmup: int = 2_000
    weight_decay: float = 0.2
    adamw_b2: float = 0.98
    adamw_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = True
    loss_blocks: int = 1
    chunks: int = 1

    @property
    def network(self) -> CLIPConfig:
        return CLIPConfig.b16(dtype=self.dtype, remat=self.remat)

    def method(self) -> CLIP:
        return CLIP(self.network, loss_blocks=self.loss_blocks, chunks=self.chunks)

    def optimizer(self) -> Optimizer:
        schedule = warmup_cosine(self.learning_rate, self.steps, self.warmup)
        return Optimizer(adamw(schedule, self.weight_decay, b2=self.adamw_b2, eps=self.adamw_eps))

    def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the global batch."""
        side, length = self.network.image_size, self.network.text.context_length
        return {
            "image": jax.ShapeDtypeStruct((self.batch_size, side, side, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((self.batch_size, length), jnp.int32),
        }

    def train_data(self) -> Pipeline:
        """Crops of 90 to 100 % of the area: open_clip's form of the paper's random square crop."""
        if not self.data:
            raise MmjaxError("clip_b16 needs --data: tars of image-text pairs, a folder or a pattern")
        crop = RandomResizedCrop(self.network.image_size or 224, scale=(0.9, 1.0), resample="bicubic", shrink=True)
        return Pipeline(
            WebDataset(self.data, needs=("image", "text")),
            self.batch_size,
            seed=self.seed,
            transforms=(crop, EncodeText(self.tokenizer())),
            workers=self.workers,
            max_bad_fraction=self.max_bad_fraction,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def tokenizer(self) -> CLIPTokenizer:
        return CLIPTokenizer.from_merges(self.merges)

    def evaluations(self) -> tuple[Any, ...]:
        """None beside training: `mmjax evaluate WORKDIR --task zero-shot` takes any checkpoint."""
        return ()

    def model(self) -> tuple[str, CLIPConfig]:
        return "clip", self.network

    def save_assets(self, workdir: pathlib.Path) -> dict[str, Any]:
        self.tokenizer().save(workdir / "tokenizer.json")
        return {"tokenizer": "tokenizer.json"}
