"""Random models of transformers, loaded from the files they save: same outputs, and a bit-exact export.

Small models with a prime for every size, and two of full size. Every parameter and buffer is random:
what a library initialises to zeros and ones hides half of the mistakes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mmjax
from mmjax.weights.files import write_safetensors

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]  # transformers has deprecation warnings

LIMIT = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """How to make a model of transformers, its inputs, and which outputs are compared (ours: NHWC)."""

    model: str
    config: str
    fields: dict[str, Any]
    size: tuple[int, int]
    outputs: tuple[str, ...]
    text: bool = False
    sub: tuple[str, ...] = ()
    limit: float = LIMIT


RESNET = {"num_labels": 7, "embedding_size": 8, "hidden_sizes": [16, 20, 24, 28], "depths": [2, 1, 3, 1]}
VIT = {
    "hidden_size": 30,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "intermediate_size": 37,
    "image_size": 21,
    "patch_size": 7,
    "num_labels": 11,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 3, "image_size": 35}
TOWER = {
    "hidden_size": 30,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "projection_dim": 13,
}
CLIP = {
    "projection_dim": 13,
    "text_config": TOWER | {"vocab_size": 53, "max_position_embeddings": 11, "eos_token_id": 52, "bos_token_id": 51},
    "vision_config": TOWER | {"image_size": 21, "patch_size": 7, "hidden_size": 35, "num_hidden_layers": 2},
}
MAPS = ("logits", "hidden_states")
TOKENS = ("last_hidden_state", "pooler_output")
PAIRS = ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")
SUB = ("vision_model_output", "text_model_output")

CASES = {
    "resnet bottleneck": Case("ResNetForImageClassification", "ResNetConfig", RESNET, (47, 53), MAPS),
    "resnet basic": Case(
        "ResNetForImageClassification", "ResNetConfig", RESNET | {"layer_type": "basic"}, (47, 53), MAPS
    ),
    "resnet v1": Case(
        "ResNetForImageClassification", "ResNetConfig", RESNET | {"downsample_in_bottleneck": True}, (41, 37), MAPS
    ),
    "resnet without head": Case(
        "ResNetModel", "ResNetConfig", RESNET, (47, 53), ("last_hidden_state", "pooler_output")
    ),
    "vit": Case("ViTModel", "ViTConfig", VIT, (21, 21), TOKENS),
    "vit classifier": Case("ViTForImageClassification", "ViTConfig", VIT, (21, 21), ("logits",)),
    "vit tanh gelu": Case(
        "ViTForImageClassification", "ViTConfig", VIT | {"hidden_act": "gelu_pytorch_tanh"}, (21, 21), ("logits",)
    ),
    "dinov2": Case("Dinov2Model", "Dinov2Config", DINO, (35, 35), TOKENS),
    "dinov2 at another size": Case("Dinov2Model", "Dinov2Config", DINO, (49, 21), TOKENS),
    "dinov2 swiglu": Case("Dinov2Model", "Dinov2Config", DINO | {"use_swiglu_ffn": True}, (35, 35), TOKENS),
    "dinov2 classifier": Case("Dinov2ForImageClassification", "Dinov2Config", DINO, (35, 35), ("logits",)),
    "clip quick gelu": Case("CLIPModel", "CLIPConfig", CLIP, (21, 21), PAIRS, text=True, sub=SUB),
    "clip gelu": Case(
        "CLIPModel",
        "CLIPConfig",
        CLIP | {part: CLIP[part] | {"hidden_act": "gelu"} for part in ("text_config", "vision_config")},
        (21, 21),
        PAIRS,
        text=True,
        sub=SUB,
    ),
    "ViT-B/16": Case("ViTForImageClassification", "ViTConfig", {"num_labels": 1000}, (224, 224), ("logits",)),
    "ResNet-50": Case("ResNetForImageClassification", "ResNetConfig", {"num_labels": 1000}, (224, 224), ("logits",)),
}


def randomise(model: Any, torch: Any) -> None:
    """Sets every parameter and float buffer to random values, as the vaults do."""
    generator = torch.Generator().manual_seed(17)

    def normal(tensor: Any) -> Any:
        return torch.randn(tensor.shape, generator=generator)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif name.endswith(("bias", "running_mean")):
                tensor.copy_(0.1 * normal(tensor))
            elif name == "logit_scale":
                tensor.fill_(1.5)
            elif ("embedding" in name and "patch" not in name) or "token" in name:
                tensor.copy_(0.5 * normal(tensor))
            elif tensor.ndim > 1:
                tensor.copy_(normal(tensor) / tensor[0].numel() ** 0.5)
            else:
                tensor.copy_(1 + 0.1 * normal(tensor))


def inputs(case: Case, b: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(19)
    arrays = {"pixel_values": rng.normal(size=(b, *case.size, 3)).astype(np.float32)}
    if case.text:
        tower = case.fields["text_config"]
        vocabulary, length = tower["vocab_size"], tower["max_position_embeddings"]
        ids = rng.integers(3, vocabulary - 2, (b, length))
        mask = np.ones_like(ids)
        ids[:, 0] = vocabulary - 2
        for row, end in enumerate(rng.integers(3, length, b)):
            ids[row, end:], mask[row, end + 1 :] = vocabulary - 1, 0
        arrays |= {"input_ids": ids, "attention_mask": mask}
    return arrays


def run(model: Any, arrays: dict[str, np.ndarray], torch: Any) -> Any:
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2)
    with torch.no_grad():
        return model(**tensors, output_hidden_states=True)


def close(actual: Any, expected: Any, name: str, limit: float) -> None:
    if isinstance(expected, tuple):
        assert len(actual) == len(expected), name
        for i, (one, other) in enumerate(zip(actual, expected)):
            close(one, other, f"{name}[{i}]", limit)
        return
    reference = expected.numpy()
    if reference.ndim == 4:
        reference = reference.transpose(0, 2, 3, 1)
    assert actual.shape == reference.shape, name
    assert np.abs(np.asarray(actual) - reference).max() <= limit * np.abs(reference).max(), name


def compare(case: Case, actual: dict[str, Any], expected: Any) -> None:
    for name in case.outputs:
        close(actual[name], expected[name], name, case.limit)
    for part in case.sub:
        for name in TOKENS:
            close(actual[part][name], expected[part][name], f"{part}.{name}", case.limit)


@pytest.fixture
def make() -> Callable[[Case], Any]:
    """Makes a case's model; skips where transformers is not there."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def build(case: Case) -> Any:
        model = getattr(transformers, case.model)(getattr(transformers, case.config)(**case.fields)).eval()
        randomise(model, torch)
        return model

    return build


@pytest.mark.parametrize("name", CASES)
def test_parity_and_the_way_back(tmp_path, make, name):
    torch, case = pytest.importorskip("torch"), CASES[name]
    reference = make(case)
    reference.save_pretrained(tmp_path / "theirs")
    arrays = inputs(case, b=1 if max(case.size) > 100 else 3)
    expected = run(reference, arrays, torch)
    loaded = mmjax.load(tmp_path / "theirs")
    compare(case, loaded.forward(**arrays), expected)

    mmjax.export(loaded, tmp_path / "back", layout="hf")
    back = type(reference).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(back[1].values()), back[1]
    state = back[0].state_dict()
    assert state.keys() == reference.state_dict().keys()
    for key, tensor in reference.state_dict().items():
        assert torch.equal(state[key], tensor), key
    reloaded = run(back[0].eval(), arrays, torch)
    for output in case.outputs:
        if output != "hidden_states":
            # The weights are the same bits; PyTorch's sums differ with where a reloaded model lies in memory.
            difference = (reloaded[output] - expected[output]).abs().max()
            assert difference <= 1e-5 * expected[output].abs().max(), output


@pytest.mark.parametrize("name", ["vit", "vit classifier", "dinov2", "dinov2 swiglu", "dinov2 classifier", "clip gelu"])
def test_the_keys_of_transformers_5_in_memory_are_read_as_well(tmp_path, make, name):
    """Its modules have other names than the files it writes, which keep the names of transformers 4."""
    case = CASES[name]
    reference = make(case)
    reference.config.save_pretrained(tmp_path)
    state = {key: tensor.numpy() for key, tensor in reference.state_dict().items() if not key.endswith("position_ids")}
    write_safetensors(tmp_path / "model.safetensors", state, {"format": "pt"})
    arrays = inputs(case, b=2)
    compare(case, mmjax.load(tmp_path).forward(**arrays), run(reference, arrays, pytest.importorskip("torch")))
