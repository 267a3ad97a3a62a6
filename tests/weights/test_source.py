"""Which files of a hub repository are downloaded; the lists are those of repositories as the hub has them."""

import pytest

import mmjax
from mmjax.errors import MmjaxError
from mmjax.weights.source import files_to_download, resolve_source

SMALL = ["config.json", "tokenizer.json", "tokenizer_config.json"]
REPOSITORIES = {
    "openai/clip-vit-base-patch32": (
        ["model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt", *SMALL],
        [".gitattributes", "README.md", "flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"],
    ),
    "google-bert/bert-base-uncased": (
        ["model.safetensors", "vocab.txt", *SMALL],
        [
            "coreml/fill-mask/float32_model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
            "pytorch_model.bin",
            "LICENSE",
            "flax_model.msgpack",
            "model.onnx",
            "rust_model.ot",
            "tf_model.h5",
        ],
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        ["generation_config.json", "model.safetensors.index.json", "params.json", "tokenizer.model", *SMALL]
        + [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        + ["special_tokens_map.json"],
        ["README.md", "consolidated.safetensors", "tokenizer.model.v3"],
    ),
    "meta-llama/Llama-3.2-1B": (
        ["generation_config.json", "model.safetensors", "special_tokens_map.json", *SMALL],
        ["LICENSE.txt.md", "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"],
    ),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": (
        ["model.safetensors", "merges.txt", "open_clip_config.json", "preprocessor_config.json", "vocab.json", *SMALL],
        ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin"],
    ),
    "facebook/opt-6.7b": (
        ["generation_config.json", "merges.txt", "pytorch_model.bin.index.json", "vocab.json", "config.json"]
        + [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)],
        ["flax_model-00001-of-00002.msgpack", "flax_model.msgpack.index.json", "tf_model.h5"],
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        ["generation_config.json", "merges.txt", "model.safetensors", "vocab.json", "all_results.json", *SMALL],
        ["onnx/model.onnx", "onnx/model_q4.onnx", "runs/events.out.tfevents", "training_args.bin"],
    ),
    "somebody/checkpoint-of-albef": (["ALBEF.pth", "vocab.txt"], ["images/figure.png", "README.md"]),
    "somebody/with-templates": (
        ["additional_chat_templates/tool_use.jinja", "chat_template.jinja", "model.safetensors", *SMALL],
        ["fp16/model.safetensors"],
    ),
    "sentence-transformers/all-MiniLM-L6-v2": (
        [
            "1_Pooling/config.json",
            "modules.json",
            "sentence_bert_config.json",
            "model.safetensors",
            "vocab.txt",
            *SMALL,
        ],
        ["onnx/model.onnx", "pytorch_model.bin", "train_script.py", "2_Normalize/.gitkeep"],
    ),
    "Qwen/one-file-gguf": (["model-q4_k_m.gguf"], ["README.md"]),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_one_copy_of_the_weights_and_the_small_files_are_downloaded(name, monkeypatch, tmp_path):
    import huggingface_hub

    needed, others = REPOSITORIES[name]
    requests = []

    def download(repository, allow_patterns):
        requests.append((repository, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: [*others, *needed])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source(name) == tmp_path
    assert requests == [(name, sorted(needed))]


def test_several_files_without_a_rule_are_not_downloaded():
    names = ["README.md", "model-q4_k_m.gguf", "model-q8_0.gguf"]
    with pytest.raises(
        MmjaxError, match=r"several weight files \(model-q4_k_m\.gguf, model-q8_0\.gguf\); download one"
    ):
        files_to_download("Qwen/quantised", names)
    with pytest.raises(MmjaxError, match="Qwen/nothing holds no weight file"):
        files_to_download("Qwen/nothing", ["README.md", "config.json"])


def test_without_network_the_local_copy_is_used(monkeypatch, tmp_path):
    import huggingface_hub

    def no_network(*_, **options):
        if options.get("local_files_only"):
            return str(tmp_path)
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", no_network)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    assert resolve_source("somebody/toy") == tmp_path


def test_an_unreachable_hub_is_reported(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(MmjaxError, match=r"somebody/nothing: .* the hub could not be read: offline"):
        mmjax.load("somebody/nothing")
