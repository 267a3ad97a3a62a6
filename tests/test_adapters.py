"""Adapters in PEFT's format: files written by hand, and `peft` itself, both ways."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax import tree
from mmjax.adapters import export_lora, load_lora
from mmjax.errors import MmjaxError
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.tasks import CLIPModel
from mmjax.models.vit.network import ViTConfig
from mmjax.training.lora import LoRAConfig, adapted, init_lora, merge_lora, split_lora

IDS = jnp.array([[51, 3, 5, 52, 52, 52, 52], [51, 7, 11, 13, 17, 52, 52]])
CONFIG = CLIPConfig(ViTConfig.clip(14, 7, 20, 1, 5, 23), CLIPTextConfig(7, 53, 30, 2, 5, 37), 13, act="quick_gelu")


def clip() -> CLIPModel:
    shapes = CLIPModel.shapes(CONFIG)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)
    return CLIPModel(config=CONFIG, params=params)


def with_adapters(model: Any, *patterns: str, rank: int = 3, alpha: float = 7.0) -> Any:
    initial = init_lora(jax.random.key(0), model.params, LoRAConfig(patterns, rank, alpha))
    moved = tree.map_with_path(lambda path, x: x + 0.1 if path.endswith("lora_b") else x, initial)
    return model.replace(params=tree.merge(model.params, moved))


def test_a_round_trip_gives_the_same_bits(tmp_path):
    model = with_adapters(clip(), "text/encoder/*/attention/q", "**/mlp/up")
    export_lora(model, tmp_path, dropout=0.1)
    arrays, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    key = "base_model.model.text_model.encoder.layers.1.self_attn.q_proj.lora_A.weight"
    assert arrays[key].shape == (3, 30) and len(arrays) == 2 * (2 + 3)
    np.testing.assert_array_equal(arrays[key].T, model.params["text"]["encoder"]["block_1"]["attention"]["q"]["lora_a"])
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["alpha_pattern"]) == (3, 7.0, 0.1, {})
    again = load_lora(clip(), tmp_path)
    assert tree.tree_hash(again.params) == tree.tree_hash(tree.merge(model.params))
    assert tree.tree_hash(load_lora(again, tmp_path).params) == tree.tree_hash(again.params)


def test_several_ranks_and_alphas(tmp_path):
    model = with_adapters(with_adapters(clip(), "text/**/q"), "text/**/v", rank=2, alpha=5.0)
    export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["rank_pattern"].values()) == [2, 2] and sorted(config["alpha_pattern"].values()) == [5.0, 5.0]
    assert tree.tree_hash(load_lora(clip(), tmp_path).params) == tree.tree_hash(model.params)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {}, "use_rslora": True}))
    scale = load_lora(clip(), tmp_path).params["text"]["encoder"]["block_0"]["attention"]["v"]["lora_scale"]
    assert abs(float(scale) - 7 / 2**0.5) < 1e-6


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = with_adapters(clip(), "text/**/q")
    with pytest.raises(MmjaxError, match=r"text/encoder/block_0/attention/q, .*fused with others in the layout 'open"):
        export_lora(model, tmp_path, layout="openai")
    with pytest.raises(MmjaxError, match="no adapters"):
        export_lora(clip(), tmp_path)
    with pytest.raises(MmjaxError, match=r"adapter_config.json: not there"):
        load_lora(clip(), tmp_path)
    export_lora(model, tmp_path)
    file, config_file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    arrays, config = load_file(file), config_file.read_text()
    for change, message in (
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"),
    ):
        config_file.write_text(json.dumps({**json.loads(config), **change}))
        with pytest.raises(MmjaxError, match=message):
            load_lora(clip(), tmp_path)
    config_file.write_text(config)
    layer = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    for name, array, message in (
        (f"{layer}.lora_A.weight", np.zeros((3, 29), np.float32), r"q_proj: \[29, 3\] @ \[3, 30\] for \[30, 30\]"),
        ("base_model.model.other.lora_A.weight", np.zeros((3, 30), np.float32), "other is not a matrix of this clip"),
        ("base_model.model.classifier.weight", np.zeros((3, 30), np.float32), "classifier.weight is no adapter"),
    ):
        save_file({**arrays, name: array}, file)
        with pytest.raises(MmjaxError, match=message):
            load_lora(clip(), tmp_path)
    save_file({name: array for name, array in arrays.items() if name != f"{layer}.lora_B.weight"}, file)
    with pytest.raises(MmjaxError, match=r"0.self_attn.q_proj has \['lora_a'\]"):
        load_lora(clip(), tmp_path)


# ---------------------------------------------------------------------------------------------------------------- peft


def close(one: Any, other: Any) -> None:
    other = other.detach().numpy()
    assert np.abs(np.asarray(one) - other).max() < 1e-4 * np.abs(other).max()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_peft_computes_the_same_with_our_adapters_and_we_with_its(tmp_path):
    """A CLIP text tower, q, k and v split and a feed-forward matrix; in PEFT with dropout, which evaluation has not."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    model = with_adapters(clip(), "text/**/attention/[qv]", "text/**/mlp/down")
    mmjax.export(model.replace(params=split_lora(model.params)[1]), tmp_path / "base")
    export_lora(model, tmp_path / "ours", dropout=0.2)

    def base() -> Any:
        return transformers.CLIPModel.from_pretrained(tmp_path / "base").eval()

    ids = torch.tensor(np.asarray(IDS))
    reference = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    adapted_outputs = jax.jit(adapted(lambda params: model.outputs({"params": params}, {"input_ids": IDS})))
    with torch.no_grad():
        close(
            adapted_outputs(model.params)["text_model_output"]["last_hidden_state"],
            reference.text_model(ids).last_hidden_state,
        )
    merged = model.replace(params=merge_lora(model.params)).forward(input_ids=IDS)
    assert np.abs(merged["text_embeds"] - adapted_outputs(model.params)["text_embeds"]).max() < 1e-5
    assert np.abs(merged["text_embeds"] - clip().forward(input_ids=IDS)["text_embeds"]).max() > 0.01

    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "fc1", "text_projection"])
    wrapped = peft.get_peft_model(base(), config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "reference")
    read = load_lora(clip(), tmp_path / "reference")
    assert tree.flatten(read.params)["vision/encoder/block_0/mlp/up/lora_scale"] == 1.5
    with torch.no_grad():
        features = wrapped.get_text_features(ids)
    features = getattr(features, "pooler_output", features)
    close(adapted_outputs(read.params)["text_model_output"]["pooler_output"], features)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_vit_by_the_names_of_its_modules(tmp_path):
    """transformers 5 saves a ViT under older names than its modules have; PEFT goes by the modules."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    sizes = {"hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 37}
    reference = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=14, patch_size=7)
    ).eval()
    reference.save_pretrained(tmp_path / "base")
    names = {name.split(".")[-1] for name, module in reference.named_modules() if "layers.0.attention." in name}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=sorted(name for name in names if name.endswith("_proj")))
    wrapped = peft.get_peft_model(reference, config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "reference")
    read = load_lora(mmjax.load(tmp_path / "base"), tmp_path / "reference", layout="hf_modules")
    pixels = np.random.default_rng(0).standard_normal((2, 14, 14, 3), np.float32)
    merged = read.replace(params=merge_lora(read.params)).forward(pixel_values=pixels)
    with torch.no_grad():
        close(merged["logits"], wrapped(torch.tensor(pixels.transpose(0, 3, 1, 2))).logits)
    export_lora(read, tmp_path / "back", layout="hf_modules")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("reference", "back"))
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
