"""The other side of image_text.py: the originals' pre-training step of ALBEF-base and BLIP-base, in PyTorch.

Written from the papers' algorithms (ALBEF model_pretrain.py, BLIP blip_pretrain.py), with torch's fused attention
where the originals write softmax(q k^T) v out, so that this is the faster form of the same step.
"""

import copy
import os
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.benchmarks.timing import Timed

VOCAB, EMBED, ALPHA, MOMENTUM = 30524, 256, 0.4, 0.995
PAD, CLS, MASK, DEC, ENC = 0, 101, 103, 30522, 30523
DROPOUT = 0.1


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, context: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Any, context: Any = None, mask: Any = None, causal: bool = False) -> Any:
        context = x if context is None else context
        q, k, v = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q(x), self.k(context), self.v(context))
        )
        if causal:
            triangle = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            mask = triangle if mask is None else mask & triangle
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attention = Attention(width, heads, width, 0.0)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Vision(nn.Module):
    def __init__(self, side: int, depth: int, width: int = 768, heads: int = 12):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (side // 16) ** 2, width))
        self.blocks = nn.ModuleList(VisionBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6)

    def forward(self, images: Any) -> Any:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class SelfAttention(nn.Module):
    """The part of a text block that BLIP's decoder has for itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.norm = Attention(width, heads, width, DROPOUT), nn.LayerNorm(width, 1e-12)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: Any, mask: Any, causal: bool) -> Any:
        return self.norm(x + self.drop(self.attention(x, None, mask, causal)))


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int, cross: bool):
        super().__init__()
        self.own = SelfAttention(width, heads)
        self.cross = Attention(width, heads, width, DROPOUT) if cross else None
        self.cross_norm = nn.LayerNorm(width, 1e-12) if cross else None
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.drop = nn.LayerNorm(width, 1e-12), nn.Dropout(DROPOUT)

    def forward(self, x: Any, mask: Any, context: Any = None, own: Any = None, causal: bool = False) -> Any:
        x = (own or self.own)(x, mask, causal)
        if context is not None and self.cross is not None:
            x = self.cross_norm(x + self.drop(self.cross(x, context)))
        return self.norm(x + self.drop(self.down(F.gelu(self.up(x)))))


class Text(nn.Module):
    """cross_from: the first block with cross attention."""

    def __init__(self, depth: int, cross_from: int, types: bool, width: int = 768, heads: int = 12):
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCAB, width), nn.Embedding(512, width)
        self.types = nn.Embedding(2, width) if types else None
        self.norm, self.drop = nn.LayerNorm(width, 1e-12), nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(TextBlock(width, heads, i >= cross_from) for i in range(depth))

    def embed(self, ids: Any) -> Any:
        x = self.words(ids) + self.positions.weight[: ids.shape[1]]
        return self.drop(self.norm(x if self.types is None else x + self.types.weight[0]))

    def run(self, x: Any, mask: Any, context: Any = None, first: int = 0, last: int | None = None, **own: Any) -> Any:
        for i, block in list(enumerate(self.blocks))[first:last]:
            x = block(x, mask, context, own["own"][i] if "own" in own else None, causal="own" in own)
        return x


class Head(nn.Module):
    """The LM head; its matrix is the word embedding."""

    def __init__(self, width: int = 768):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, 1e-12)
        self.bias = nn.Parameter(torch.zeros(VOCAB))

    def forward(self, x: Any, words: Any) -> Any:
        return F.linear(self.norm(F.gelu(self.dense(x))), words.weight, self.bias)


class Network(nn.Module):
    """Both systems; BLIP's has the decoder's own self-attention too."""

    def __init__(self, name: str, side: int, depth: int, width: int = 768):
        super().__init__()
        self.vision = Vision(side, depth)
        self.text = Text(depth, depth // 2 if name == "albef" else 0, types=name == "albef")
        self.vision_proj, self.text_proj = nn.Linear(width, EMBED), nn.Linear(width, EMBED)
        self.head = Head()
        self.own = nn.ModuleList(SelfAttention(width, 12) for _ in range(depth)) if name == "blip" else None
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)


class Step:
    """One training step on one batch; keeps its parameters, momentum copy, queues and optimizer."""

    def __init__(self, name: str, batch: dict[str, np.ndarray], depth: int, queue: int, adamw: dict[str, Any]):
        side = batch["image"].shape[1]
        self.name, self.half = name, depth // 2
        self.network = Network(name, side, depth)
        self.teacher = copy.deepcopy(self.network).requires_grad_(False)
        self.itm, self.temperature = nn.Linear(768, 2), nn.Parameter(torch.tensor(0.07))
        parameters = [*self.network.parameters(), *self.itm.parameters(), self.temperature]
        self.optimizer = torch.optim.AdamW(parameters, lr=adamw["learning_rate"], weight_decay=adamw["weight_decay"])
        self.queues = [F.normalize(torch.randn(EMBED, queue), dim=0) for _ in range(2)]
        self.cursor = 0
        self.images = torch.tensor(batch["image"]).permute(0, 3, 1, 2).contiguous()
        self.ids = torch.tensor(batch["input_ids"]).long()
        self.mask = torch.tensor(batch["attention_mask"]).bool()

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def features(self, network: Network) -> tuple[Any, Any, Any, Any]:
        image = network.vision(self.images)
        last = self.half if self.name == "albef" else None
        text = network.text.run(network.text.embed(self.ids), self.mask[:, None, None], last=last)
        image_embeds = F.normalize(network.vision_proj(image[:, 0]), dim=-1)
        return image, text, image_embeds, F.normalize(network.text_proj(text[:, 0]), dim=-1)

    def loss(self) -> Any:
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        image, text, image_embeds, text_embeds = self.features(self.network)
        with torch.no_grad():
            parts = ("vision", "text", "vision_proj", "text_proj") + (("head",) if self.name == "albef" else ())
            for part in parts:
                pairs = zip(getattr(self.teacher, part).parameters(), getattr(self.network, part).parameters())
                for slow, fast in pairs:
                    slow.mul_(MOMENTUM).add_(fast, alpha=1 - MOMENTUM)
            teacher_image, _, image_keys, text_keys = self.features(self.teacher)
            keys = [torch.cat([k.T, q], 1) for k, q in zip((image_keys, text_keys), self.queues)]
            targets = [self.targets(image_keys, keys[1]), self.targets(text_keys, keys[0])]
        similarities = [image_embeds @ keys[1] / self.temperature, text_embeds @ keys[0] / self.temperature]
        contrast = sum(-(t * F.log_softmax(s, 1)).sum(1).mean() for t, s in zip(targets, similarities)) / 2
        self.enqueue(image_keys, text_keys)
        matching = self.matching(image, text, similarities)
        words = self.masked(image, teacher_image) if self.name == "albef" else self.captions(image)
        return contrast + matching + words

    def targets(self, features: Any, keys: Any) -> Any:
        soft = F.softmax(features @ keys / self.temperature, 1)
        return ALPHA * soft + (1 - ALPHA) * torch.eye(*soft.shape)

    def enqueue(self, image_keys: Any, text_keys: Any) -> None:
        for queue, key in zip(self.queues, (image_keys, text_keys)):
            queue[:, self.cursor : self.cursor + len(key)] = key.T
        self.cursor = (self.cursor + len(image_keys)) % self.queues[0].shape[1]

    def matching(self, image: Any, text: Any, similarities: list[Any]) -> Any:
        b = len(image)
        with torch.no_grad():
            floor = 1e-4 if self.name == "blip" else 0.0
            weights = [(F.softmax(s[:, :b], 1) + floor).fill_diagonal_(0) for s in similarities]
            texts, images = (torch.multinomial(w, 1)[:, 0] for w in weights)
        positive = self.multimodal(text, self.mask, image, self.ids)
        both = torch.cat([text, text[texts]]), torch.cat([self.mask, self.mask[texts]])
        ids = torch.cat([self.ids, self.ids[texts]])
        negative = self.multimodal(*both, torch.cat([image[images], image]), ids)
        logits = self.itm(torch.cat([positive[:, 0], negative[:, 0]]))
        return F.cross_entropy(logits, torch.cat([torch.ones(b), torch.zeros(2 * b)]).long())

    def multimodal(self, states: Any, mask: Any, image: Any, ids: Any) -> Any:
        """ALBEF continues from the states of the text alone, BLIP begins with the ids."""
        text = self.network.text
        if self.name == "albef":
            return text.run(states, mask[:, None, None], image, first=self.half)
        ids = ids.clone()
        ids[:, 0] = ENC
        return text.run(text.embed(ids), mask[:, None, None], image)

    def masked(self, image: Any, teacher_image: Any) -> Any:
        """Masked language modelling with the momentum model's soft labels."""
        chosen = (torch.rand(self.ids.shape) < 0.15) & (self.ids != PAD) & (self.ids != CLS)
        chosen[:, 1] = True  # at least one in each text
        labels = torch.where(chosen, self.ids, -100)
        ids = torch.where(chosen, MASK, self.ids)

        def logits(network: Network, image: Any) -> Any:
            states = network.text.run(network.text.embed(ids), self.mask[:, None, None], image)
            return network.head(states, network.text.words)

        student = logits(self.network, image)
        with torch.no_grad():
            soft = F.softmax(logits(self.teacher, teacher_image), -1)
        hard = F.cross_entropy(student.flatten(0, 1), labels.flatten())
        distilled = -(soft * F.log_softmax(student, -1)).sum(-1)[chosen].mean()
        return (1 - ALPHA) * hard + ALPHA * distilled

    def captions(self, image: Any) -> Any:
        ids = self.ids.clone()
        ids[:, 0] = DEC
        text = self.network.text
        states = text.run(text.embed(ids), self.mask[:, None, None], image, own=self.network.own)
        logits = self.network.head(states, text.words)[:, :-1]
        labels = torch.where(self.mask, ids, -100)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def timed(name: str, batch: dict[str, np.ndarray], depth: int, queue: int, adamw: dict[str, Any]) -> Timed:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return Step(name, batch, depth, queue, adamw)
