"""xGen-MM restated in PyTorch from its fact sheet, on transformers' SigLIP and Phi-3, with the keys of its files."""

from typing import Any

import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

SIDE, PATCH, LATENTS, LENGTH = 23, 7, 5, 50
"""3 x 3 tokens of a picture, two pixels of each axis are in none. Ids below LENGTH are the tokenizer's."""
IMAGE, PAD, END = LENGTH, 49, 7
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
VISION = {
    "hidden_size": 24,
    "intermediate_size": 30,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = {
    "vocab_size": 56,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "sliding_window": 2047,
}
SAMPLER = {"heads": 3, "dim_head": 4, "depth": 2}
CONFIG: dict[str, Any] = {
    "model_type": "xgenmm",
    "architectures": ["XGenMMModelForConditionalGeneration"],
    "vision_encoder_config": {**VISION, "anyres_grids": [[w * SIDE, h * SIDE] for w, h in GRIDS]},
    "vision_tokenizer_config": {"heads": SAMPLER["heads"]},
    "text_config": {**TEXT, "model_type": "phi3", "initial_tokenizer_len": LENGTH},
}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.norm_media, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x, latents, mask):
        x, latents = self.norm_media(x), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([x, latents], 1)).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2) for y in (self.to_q(latents), k, v))
        scores = q * self.dim_head**-0.5 @ k.transpose(-1, -2)
        visible = torch.cat([mask, torch.ones(len(mask), latents.shape[1])], 1)
        scores = scores.masked_fill(visible[:, None, None] == 0, float("-inf"))
        return self.to_out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Sampler(nn.Module):
    def __init__(self, dim: int, out: int, latents: int, depth: int, heads: int, dim_head: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim))
        self.projection, self.norm, self.layers = nn.Linear(dim, out), nn.LayerNorm(dim), nn.ModuleList()
        for _ in range(depth):
            ff = nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
            )
            self.layers.append(nn.ModuleList([Attention(dim, heads, dim_head), ff]))

    def forward(self, x, mask):
        latents = self.latents.expand(len(x), -1, -1)
        for attention, ff in self.layers:  # type: ignore[misc]
            latents = attention(x, latents, mask) + latents
            latents = ff(latents) + latents
        return self.projection(self.norm(latents))


class Embedding(nn.Embedding):
    def __init__(self, rows: int, width: int, largest: int):
        super().__init__(rows, width)
        self.largest, self.additional_embedding = largest, nn.Embedding(3, width)

    def forward(self, ids):  # type: ignore[override]
        added = ids > self.largest
        x = super().forward(torch.where(added, 0, ids))
        return torch.where(added[..., None], self.additional_embedding((ids - self.largest - 1).clamp(0)), x)


class Head(nn.Linear):
    def __init__(self, width: int, rows: int, largest: int):
        super().__init__(width, rows)
        self.largest, self.additional_fc = largest, nn.Linear(width, 3)

    def forward(self, x):  # type: ignore[override]
        return torch.cat([super().forward(x)[..., : self.largest + 1], self.additional_fc(x)], -1)


class XGenMM(nn.Module):
    """images: of each the tiles [1 + n, 3, h, w] and the (width, height) of the original."""

    def __init__(self) -> None:
        super().__init__()
        width, text = VISION["hidden_size"], TEXT["hidden_size"]
        self.vision_encoder = SiglipVisionModel(SiglipVisionConfig(**VISION))
        self.vision_tokenizer = Sampler(width, text, LATENTS, **SAMPLER)
        self.lang_model = Phi3ForCausalLM(Phi3Config(**TEXT))
        self.lang_model.set_input_embeddings(Embedding(TEXT["vocab_size"], text, LENGTH - 1))
        self.lang_model.lm_head = Head(text, TEXT["vocab_size"], LENGTH - 1)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for key, tensor in self.named_parameters():
                noise = torch.randn(tensor.shape, generator=generator)
                scale = 1.5 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.3
                scale = 0.5 if "embed" in key or "latents" in key else scale
                tensor.copy_(1 + 0.1 * noise if "norm" in key and key.endswith("weight") else scale * noise)
        self.eval()

    def sampled(self, tiles, size):
        """[tokens, d] of one image: base tile first, then runs of the merged map."""
        features = self.vision_encoder(tiles).last_hidden_state
        n = features.shape[1]
        side = int(n**0.5)
        columns, rows = best(size)
        merged = features[1:].view(rows, columns, side, side, -1)
        merged = merged.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)  # [c, rows * side, columns * side]
        mask = shown(size, merged.shape[1:])
        merged = merged.contiguous().view(merged.shape[0], rows, columns, n).permute(1, 2, 3, 0).flatten(0, 1)
        x = torch.cat([features[:1], merged])
        mask = torch.cat([torch.ones(1, n), mask.view(rows * columns, n)])
        return self.vision_tokenizer(x, mask).flatten(0, 1)

    def embedded(self, ids, images):
        """Embeddings of one row of ids, in which one id is one image."""
        x, parts, images = self.lang_model.get_input_embeddings()(ids), [], iter(images)
        for i, id in enumerate(ids.tolist()):
            parts.append(self.sampled(*next(images)) if id == IMAGE else x[i : i + 1])
        return torch.cat(parts)

    def forward(self, rows, images):
        """Logits of each row; images: those of each row."""
        embeds = [self.embedded(torch.as_tensor(ids), each) for ids, each in zip(rows, images)]
        return [self.lang_model(inputs_embeds=x[None]).logits[0] for x in embeds]


def best(size: tuple[int, int]) -> tuple[int, int]:
    """(columns, rows) of the tiles of an image of (width, height)."""
    chosen, most, least = GRIDS[0], 0, float("inf")
    for w, h in GRIDS:
        scale = min(w * SIDE / size[0], h * SIDE / size[1])
        pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        waste = w * h * SIDE**2 - pixels
        if pixels > most or (pixels == most and waste < least):
            chosen, most, least = (w, h), pixels, waste
    return chosen


def shown(size: tuple[int, int], area: tuple[int, int]):
    """1 where a map of tokens shows an image of (width, height)."""
    mask, (down, across) = torch.ones(area), area
    if size[0] / size[1] > across / down:
        padding = (down - int(size[1] * (across / size[0]))) // 2
        mask[:padding], mask[down - padding :] = 0, 0
    else:
        padding = (across - int(size[0] * (down / size[1]))) // 2
        mask[:, :padding], mask[:, across - padding :] = 0, 0
    return mask
