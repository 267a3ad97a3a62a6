"""The other side of networks.py: transformers' ResNet-50, ViT-B/16, CLIP B/32 and BERT-base (SDPA attention), torch's
optimizers.

On a GPU that torch sees: bfloat16 by autocast, channels last.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

from experiments.benchmarks.timing import Timed


def model(name: str, blocks: tuple[int, ...], depth: int, classes: int) -> Any:
    """transformers' defaults are the published sizes."""
    labels = {i: str(i) for i in range(classes)}
    if name == "resnet":
        return transformers.ResNetForImageClassification(
            transformers.ResNetConfig(depths=list(blocks), id2label=labels)
        )
    if name == "vit":
        return transformers.ViTForImageClassification(
            transformers.ViTConfig(num_hidden_layers=depth, layer_norm_eps=1e-6, id2label=labels)
        )
    if name == "bert":
        return transformers.BertForPreTraining(transformers.BertConfig(num_hidden_layers=depth))
    towers: dict[str, Any] = {f"{tower}_config": {"num_hidden_layers": depth} for tower in ("text", "vision")}
    return transformers.CLIPModel(transformers.CLIPConfig(**towers))


def texts(data: Mapping[str, np.ndarray], device: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(BERT's inputs, its labels: -100 where nothing is masked)."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.tensor(data[name]).long().to(device) for name in names}
    labels = np.full(data["input_ids"].shape, -100, np.int64)
    np.put_along_axis(labels, data["masked_positions"], data["masked_ids"], 1)
    targets = {"labels": torch.tensor(labels), "next_sentence_label": torch.tensor(data["next_label"]).long()}
    return inputs, {name: value.to(device) for name, value in targets.items()}


def timed(
    name: str,
    data: Mapping[str, np.ndarray],
    blocks: tuple[int, ...],
    depth: int,
    classes: int,
    sgd: Mapping[str, Any],
    adamw: Mapping[str, Any],
) -> dict[str, Timed]:
    """{"forward", "step"}, each on the same batch."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda"
    network = model(name, blocks, depth, classes).to(device)
    if name == "bert":
        inputs, targets = texts(data, device)
    else:
        inputs, targets = {"pixel_values": torch.tensor(data["image"]).permute(0, 3, 1, 2).contiguous().to(device)}, {}
    if half and name != "bert":
        network = network.to(memory_format=torch.channels_last)
        inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
    if name == "clip":
        inputs |= {"input_ids": torch.tensor(data["text"]).long().to(device)}
    labels = torch.tensor(data["label"]).long().to(device) if "label" in data else None
    if name == "resnet":
        rates = {"lr": sgd["learning_rate"], "momentum": sgd["momentum"], "weight_decay": sgd["weight_decay"]}
        optimizer: Any = torch.optim.SGD(network.parameters(), **rates)
    else:
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=adamw["learning_rate"], weight_decay=adamw["weight_decay"]
        )

    def precision() -> Any:
        return torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext()

    def wait() -> None:
        if half:
            torch.cuda.synchronize()

    def forward() -> None:
        network.eval()
        with torch.no_grad(), precision():
            network(**inputs)
        wait()

    def step() -> None:
        network.train()
        optimizer.zero_grad()
        with precision():
            if targets:
                loss = network(**inputs, **targets).loss
            elif labels is None:
                loss = network(**inputs, return_loss=True).loss
            else:
                loss = torch.nn.functional.cross_entropy(network(**inputs).logits.float(), labels)
        loss.backward()
        optimizer.step()
        if name == "clip":
            with torch.no_grad():
                network.logit_scale.clamp_(0, math.log(100))
        loss.item()
        wait()

    return {"forward": forward, "step": step}
