"""BLIP-2's first stage against transformers' Blip2ForImageTextRetrieval, and its layouts both ways."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tiny_blip2 as tiny

import mmjax
from mmjax.errors import MmjaxError
from mmjax.models.blip2.checkpoint_lavis import LAVIS
from mmjax.models.blip2.tasks import Blip2Model
from mmjax.tree import flatten, tree_hash
from mmjax.weights.files import write_safetensors
from mmjax.weights.table import save_table

SIDE, VOCAB, QUERIES = 21, 53, 6
QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "vocab_size": VOCAB,
    "max_position_embeddings": 40,
    "cross_attention_frequency": 2,
    "use_qformer_text_input": True,
}
VISION = {
    "hidden_size": 35,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": SIDE,
    "patch_size": 7,
}


def make(**fields: Any) -> Any:
    """transformers' model with random parameters, the bias of the keys too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"qformer_config": QFORMER, "vision_config": VISION, "num_query_tokens": QUERIES}
    config = transformers.Blip2Config(**sizes, image_text_hidden_size=13, **fields)
    model = transformers.Blip2ForImageTextRetrieval(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in key.lower() and key.endswith("weight"):
                tensor.copy_(1 + 0.1 * noise)
            else:
                spread = 0.1 if tensor.ndim == 1 else 0.5 if "embed" in key or "query" in key else 1.5
                tensor.copy_(spread / (tensor[0].numel() ** 0.5 if spread == 1.5 else 1) * noise)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Any, Any]:
    """(transformers' model, ours from its files)."""
    folder = tmp_path_factory.mktemp("blip2")
    reference = make()
    reference.save_pretrained(folder)
    return reference, mmjax.load(folder)


def arrays(size: int = 3, length: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(5, VOCAB, (size, length))
    mask = (np.arange(length) < rng.integers(3, length + 1, (size, 1))).astype(np.int64)
    pixels = rng.normal(size=(size, SIDE, SIDE, 3)).astype(np.float32)
    return {"pixel_values": pixels, "input_ids": ids * mask, "attention_mask": mask}


def tensors(values: dict[str, np.ndarray]) -> dict[str, Any]:
    import torch

    inputs = {name: torch.tensor(value) for name, value in values.items()}
    return inputs | {"pixel_values": inputs["pixel_values"].permute(0, 3, 1, 2)}


def close(actual: Any, expected: Any) -> None:
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_outputs_are_those_of_transformers(pair):
    import torch

    reference, model = pair
    assert model.layout == "hf" and model.notes == () and model.config.qformer.cross_every == 2
    inputs = arrays()
    with torch.no_grad():
        compared, matched = (reference(**tensors(inputs), use_image_text_matching_head=head) for head in (False, True))
    outputs, at = model.forward(**inputs), inputs["attention_mask"] == 1
    close(outputs["vision_model_output"]["last_hidden_state"], compared.vision_model_output.last_hidden_state)
    close(outputs["image_embeds"], compared.image_embeds)
    close(outputs["text_embeds"], compared.text_embeds)
    close(outputs["logits_per_image"], compared.logits_per_image)
    close(outputs["logits_per_text"], compared.logits_per_text)
    close(outputs["itm_logits"], matched.logits_per_image)
    states = compared.text_model_output.last_hidden_state[torch.tensor(at)]
    close(np.asarray(outputs["text_model_output"]["last_hidden_state"])[at], states)
    close(outputs["multimodal_embeds"], matched.text_model_output.last_hidden_state[:, :QUERIES])
    probabilities = matched.logits_per_image.softmax(1)[:, 1]
    close(jax.nn.softmax(outputs["itm_logits"])[:, 1], probabilities)
    fewer = model.forward(inputs["pixel_values"][:2], inputs["input_ids"], inputs["attention_mask"])
    assert fewer["logits_per_image"].shape == (2, 3) and "itm_logits" not in fewer


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_placeholders_before_the_text_are_dropped(tmp_path: pathlib.Path):
    """As transformers' processor puts them where config.json has image_token_index."""
    import torch

    reference = make(image_token_index=VOCAB)
    reference.save_pretrained(tmp_path)
    model, inputs = mmjax.load(tmp_path), arrays()
    ids = np.concatenate([np.full((3, QUERIES), VOCAB), inputs["input_ids"]], axis=1)
    mask = np.concatenate([np.ones((3, QUERIES), int), inputs["attention_mask"]], axis=1)
    longer = inputs | {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        compared, matched = (reference(**tensors(longer), use_image_text_matching_head=head) for head in (False, True))
    for outputs in (model.forward(**longer), model.forward(**inputs)):
        close(outputs["logits_per_image"], compared.logits_per_image)
        close(outputs["itm_logits"], matched.logits_per_image)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_layout_comes_back_with_the_same_bits(pair, tmp_path: pathlib.Path):
    """transformers loads the export without a complaint, and the bias of the keys, which has no effect, stays."""
    import torch

    reference, model = pair
    assert mmjax.export(model, tmp_path, layout="hf", lossy=False) == ()
    loaded, info = type(reference).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for key, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    for name in ("qformer_config", "vision_config"):
        expected, actual = (getattr(each.config, name).to_dict() for each in (reference, loaded))
        for key in (QFORMER | VISION).keys() & expected.keys():
            assert actual[key] == expected[key], key
    again = mmjax.load(tmp_path)
    assert again.config == model.config and tree_hash(again.params) == tree_hash(model.params)
    with pytest.raises(MmjaxError, match="this layout has no bias of the keys, and the model's is not zero"):
        mmjax.export(model, tmp_path / "lavis", layout="lavis")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_sparse_config_means_the_defaults_of_transformers(pair, tmp_path: pathlib.Path):
    reference, _ = pair
    reference.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    for name in ("qformer_config", "vision_config"):
        stored[name] = {key: stored[name][key] for key in ("num_attention_heads", "model_type")}
    del stored["qformer_config"]["num_attention_heads"]
    stored["qformer_config"]["pad_token_id"] = None
    file.write_text(json.dumps(stored))
    config = mmjax.load(tmp_path).config
    assert (config.qformer.heads, config.qformer.epsilon, config.vision.epsilon) == (12, 1e-12, 1e-6)
    assert (config.vision.heads, config.vision.norm_epsilon, config.bos, config.pad) == (5, None, VOCAB - 1, 0)


# ---------------------------------------------------------------------------------------------------------------- LAVIS


def write_lavis(folder: pathlib.Path, model: Blip2Model, left_out: str = "") -> None:
    """model.safetensors in LAVIS' layout with its wrapper, and config.json with the heads."""
    arrays = save_table(LAVIS.table(model.config), {"params": jax.tree.map(np.asarray, model.params)})
    folder.mkdir(exist_ok=True)
    stored = {f"model/{key}": array for key, array in arrays.items() if not (left_out and key.startswith(left_out))}
    write_safetensors(folder / "model.safetensors", stored)
    (folder / "config.json").write_text(json.dumps({"vision_heads": 3, "text_heads": 2}))


@pytest.mark.parametrize("tower", ["eva", "clip"])
def test_lavis_files_come_back(tower: str, tmp_path: pathlib.Path):
    vision = tiny.VISION if tower == "eva" else tiny.CLIP
    model = tiny.model(dataclasses.replace(tiny.PRETRAINING, vision=vision))
    write_lavis(tmp_path, model)
    loaded = mmjax.load(tmp_path)
    assert loaded.layout == "lavis" and loaded.notes == ()
    assert loaded.config == dataclasses.replace(model.config, temperature=0.07, sep=None)  # no array has them
    assert tree_hash(loaded.params) == tree_hash(model.params)
    assert ("k/bias" in " ".join(flatten(loaded.params["vision"]))) == (tower == "clip")
    losses = mmjax.export(loaded, tmp_path / "out", layout="lavis")
    heads = ("vision.heads=3 (read as 1)", "qformer.heads=2 (read as 1)")
    assert losses == heads if tower == "clip" else "the number of heads of a ViT 18 wide is in no array" in losses[0]
    assert mmjax.load(tmp_path / "out").config == loaded.config


def test_lavis_to_hugging_face(tmp_path: pathlib.Path):
    """The LM head, the temperature and the epsilon of the last norm have no name there, which is listed."""
    model = tiny.model(tiny.PRETRAINING)
    losses = mmjax.export(model, tmp_path / "hf", layout="hf")
    expected = ["params/qformer/mlm_bias", "params/qformer/mlm_transform", "params/temperature"]
    assert [loss for loss in losses if loss.startswith("params/")] == expected
    assert any("vision.norm_epsilon=1e-05" in loss for loss in losses)
    loaded = mmjax.load(tmp_path / "hf")
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    ids = np.array([[2, 7, 8, 3], [2, 9, 10, 3]])
    for name in ("itm_logits", "logits_per_image"):
        np.testing.assert_allclose(loaded.forward(images, ids)[name], model.forward(images, ids)[name], atol=1e-6)
    with pytest.raises(MmjaxError, match="Blip2VisionModel has EVA's image encoder, not CLIP's"):
        mmjax.export(tiny.model(dataclasses.replace(tiny.PRETRAINING, vision=tiny.CLIP)), tmp_path / "clip", "hf")


def test_an_encoder_in_a_file_of_its_own(tmp_path: pathlib.Path):
    """LAVIS saves what it trains; the encoder comes from eva_vit_g.pth, whose last block and head are left out."""
    torch = pytest.importorskip("torch")
    model = tiny.model(tiny.PRETRAINING)
    write_lavis(tmp_path, model, left_out="visual_encoder.")
    with pytest.raises(MmjaxError, match=r"it has no visual_encoder\.\*: .* under the name eva_vit_g.pth or clip"):
        mmjax.load(tmp_path / "model.safetensors")
    arrays = save_table(LAVIS.table(model.config), {"params": jax.tree.map(np.asarray, model.params)})
    tower = {key.removeprefix("visual_encoder."): x for key, x in arrays.items() if key.startswith("visual_encoder.")}
    unused = {"norm.weight": np.ones(18, np.float32), "blocks.39.norm1.weight": np.ones(18, np.float32)}
    torch.save({key: torch.tensor(x) for key, x in (tower | unused).items()}, tmp_path / "eva_vit_g.pth")
    loaded = mmjax.load(tmp_path / "model.safetensors")
    assert tree_hash(loaded.params) == tree_hash(model.params)
