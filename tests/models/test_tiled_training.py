"""Training on images of any resolution: the same rows as in generation, transformers' loss, and the recipes."""

import dataclasses
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.llava import tokenizer_of
from models.phi_text import VAULT, phi_tokenizer
from models.tiny_llava import GRIDS, VISION, picture
from models.tiny_text import random_params
from PIL import Image
from safetensors.numpy import load_file

import mmjax
from mmjax.data.decoding import BadRecord
from mmjax.data.instructions import InstructionList
from mmjax.models.language.config import DecoderConfig
from mmjax.models.llava.tasks import LlavaModel
from mmjax.models.llava.templates import TEMPLATES
from mmjax.models.vision_language.network import ResamplerConnector, VisionLanguageConfig
from mmjax.models.vision_language.pretrain import PrefixLM
from mmjax.models.vit.network import ViTConfig
from mmjax.models.xgen_mm.tasks import XGenMMModel
from mmjax.models.xgen_mm.template import Phi3Template
from mmjax.recipes.conversations import EncodeTiles, most_pictures
from mmjax.recipes.xgen_mm import EncodeXGenMM
from mmjax.text.image_prompts import feature_index
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train
from mmjax.training.state import Carry
from mmjax.tree import flatten, tree_hash

EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent.parent / "experiments"
pytestmark = pytest.mark.skipif(not VAULT.is_file(), reason="the vault of LLaVA's texts has the tokenizer")
SIZES = [(9, 30), (21, 8), (16, 17)]
TURNS = ("<image>\nWhat is on the table?", "A red cup.", "<image>\nAnd here?", "A clock.")
SMALL = {"batch_size": 4, "log_every": 1, "tensorboard": False, "checkpoint_every": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(load_file(VAULT)["inputs/sentencepiece_model"], legacy=True)


def encoded(size: tuple[int, int], seed: int = 0) -> bytes:
    """A PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, *size)).save(buffer, "PNG")
    return buffer.getvalue()


RECORDS = [
    {"turns": TURNS, "images": (encoded(SIZES[0]), encoded(SIZES[1], 1))},
    {"turns": TURNS[:2], "images": (encoded(SIZES[2], 2),)},
    {"turns": ("And the wall?", "Two books."), "images": ()},
]


def llava(tokenizer, **fields) -> LlavaModel:
    size = {"vocab_size": 528, "kv_heads": 1, "head_width": 6, "bos": 1, "eos": (2,), "pad": 0}
    config = VisionLanguageConfig(VISION, DecoderConfig.llama(12, 2, 2, 20, **size), template="vicuna_v1", **fields)
    model = LlavaModel(config, random_params(LlavaModel, config), tokenizer=tokenizer)
    return model.replace(preprocess=LlavaModel.default_preprocess(config, "llava"))


def xgen() -> XGenMMModel:
    tokenizer = phi_tokenizer()
    size: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size - 3,
        "unused_rows": 5,
        "added_tokens": 3,
        "head_bias": True,
    }
    size |= {"family": "phi3", "kv_heads": 1, "head_width": 6, "eos": tokenizer.eos, "pad": tokenizer.pad}
    decoder = DecoderConfig.llama(12, 2, 2, 20, **size)
    tower = ViTConfig.siglip_so400m14(width=12, depth=2, heads=2, hidden=18, patch=4, image_size=(8, 8))
    sampler = ResamplerConnector(2, 2, 5, 3)
    config = VisionLanguageConfig(tower, decoder, sampler, layer=None, grids=GRIDS, image_token=decoder.vocab_size)
    model = XGenMMModel(config, random_params(XGenMMModel, config), tokenizer=tokenizer)
    return model.replace(preprocess=XGenMMModel.default_preprocess(config, "hf"))


def encoder(model, length: int, pictures: int, **fields):
    kind, template = (EncodeTiles, TEMPLATES["v1"]) if model.system == "llava" else (EncodeXGenMM, Phi3Template())
    common = (template, model.tokenizer, model.preprocess, model.config.tile_tokens, length, pictures)
    return kind(*common, config=model.config, **fields)


def batch_of(encode, records=RECORDS) -> dict[str, jax.Array]:
    rows = [encode.map(record) for record in records]
    return {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}


@pytest.fixture(scope="module", params=["llava", "xgen_mm"])
def model(request, tokenizer):
    return llava(tokenizer, grids=GRIDS, merge="spatial_unpad") if request.param == "llava" else xgen()


def test_rows_and_logits_are_those_of_generation(model):
    """A conversation as the model's `forward` gets it, from strings and images alone."""
    encode = encoder(model, 220, 8)
    batch = batch_of(encode)
    method = PrefixLM(model.config, model.preprocess.mean, model.preprocess.std)
    logits = jax.jit(method.logits)(model.params, batch)
    token, newline = model.config.image_token, encode.pictures * encode.tokens
    for i, record in enumerate(RECORDS[:2]):
        images = [Image.open(io.BytesIO(image)) for image in record["images"]]
        visual = model.image_inputs(images)
        rows = model.pictures(visual)[1]
        text = encode.template.text(model.tokenizer, record["turns"])
        ids = np.asarray([model.encode_prompt(text, [len(each) for each in rows])])
        index, length = feature_index(ids, token, rows)[0], ids.shape[1]
        last = index.max() if model.config.newline else -1
        column = np.asarray(batch["feature_index"][i])
        np.testing.assert_array_equal(column[:length], np.where(index == last, newline if last >= 0 else last, index))
        np.testing.assert_array_equal(batch["input_ids"][i, :length], np.where(ids[0] == token, 0, ids[0]))
        assert batch["attention_mask"][i].sum() == length and (column[length:] < 0).all() and (index >= 0).sum() > 12
        expected = np.asarray(model.forward(**visual, input_ids=ids)["logits"][0])
        np.testing.assert_allclose(logits[i, :length], expected, atol=1e-4 * np.abs(expected).max())


def test_records_that_do_not_fit(model):
    encode = encoder(model, 220, 8)
    longest = int(np.flatnonzero(encode.map(RECORDS[0])["feature_index"] >= 0)[-1])
    with pytest.raises(BadRecord, match=f"an image is beyond length={longest}"):
        dataclasses.replace(encode, length=longest).map(RECORDS[0])
    with pytest.raises(BadRecord, match=r"2 images are 6 pictures, at most 5"):
        dataclasses.replace(encode, pictures=5).map(RECORDS[0])
    with pytest.raises(BadRecord, match="1 times <image> in its text for 2 images"):
        encode.map({"turns": TURNS[:2], "images": RECORDS[0]["images"]})
    assert most_pictures(model.config) == 5


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_the_loss_is_that_of_transformers(tokenizer, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from models.test_llava_hf import PINPOINTS, TEXT
    from models.test_llava_hf import VISION as TOWER

    text = TEXT | {"vocab_size": 544, "pad_token_id": 0}
    config = transformers.LlavaNextConfig(
        text_config=text, vision_config=TOWER, image_grid_pinpoints=PINPOINTS, image_token_index=540
    )
    reference = transformers.LlavaNextForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    reference.save_pretrained(tmp_path)
    model = mmjax.load(tmp_path).replace(tokenizer=tokenizer)
    encode = encoder(model, 260, 9)
    batch = batch_of(encode)
    method = PrefixLM(model.config, model.preprocess.mean, model.preprocess.std)
    rng, step = jax.random.key(0), jnp.int32(0)
    loss = jax.jit(lambda params, batch: method.loss(params, Carry(), batch, rng, step)[0])(model.params, batch)

    sizes = [SIZES[:2], SIZES[2:], []]
    tiles = []
    for pixels, each in zip(np.asarray(batch["image"]), sizes):
        start = 0
        for size in each:
            count = len(model.pictures(model.image_inputs([picture(0, *size)]))[0])
            images = model.preprocess.normalise(pixels[start : start + count])
            tiles.append(np.pad(images, ((0, 5 - count), (0, 0), (0, 0), (0, 0))))
            start += count
    ids = np.where(batch["feature_index"] >= 0, 540, batch["input_ids"])
    arrays = {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    tensors = {name: torch.as_tensor(np.array(value), dtype=torch.long) for name, value in arrays.items()}
    tensors["image_sizes"] = torch.as_tensor([size for each in sizes for size in each])
    with torch.no_grad():
        expected = reference(pixel_values=torch.as_tensor(np.moveaxis(np.stack(tiles), -1, 2).copy()), **tensors).loss
    assert abs(float(loss.value) - float(expected)) < 1e-4 * abs(float(expected))  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------------------------------- recipes


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("tiles")
    entries = []
    for i, (size, answer) in enumerate(zip(SIZES, ("red", "green", "blue"))):
        (folder / f"{i}.png").write_bytes(encoded(size, i))
        turns = [
            {"from": "human", "value": "<image>\nWhat is on the wall?"},
            {"from": "gpt", "value": f"It is {answer}."},
        ]
        entries += [{"id": str(i), "image": f"{i}.png", "conversations": turns}] * 4
    (folder / "answers.json").write_text(json.dumps(entries))
    return folder


def run(name, workdir, **fields):
    file = EXPERIMENTS / f"{name}.py"
    train(load_experiment(file)(**SMALL | fields), workdir, experiment_file=str(file))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def moved(before, after) -> set[str]:
    other = flatten(after)
    return {path for path, leaf in flatten(before).items() if not np.array_equal(leaf, other[path])}


def test_llava_is_fine_tuned_with_tiles(files, tokenizer, tmp_path):
    mmjax.hub.save(llava(tokenizer), tmp_path / "start")
    data = {"data": str(files / "answers.json"), "length": 120, "init_from": str(tmp_path / "start")}
    losses = run("llava_finetune", tmp_path / "run", steps=16, any_resolution=True, learning_rate=3e-2, **data)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    start, tuned = mmjax.load(tmp_path / "start"), mmjax.load(tmp_path / "run")
    assert len(tuned.config.grids) == 5 and tuned.config.merge == "spatial_unpad" and tuned.params["newline"].any()
    assert not tuned.preprocess.pad and tuned.preprocess.grids == tuned.config.grids
    assert {path.split("/")[0] for path in moved(start.params, tuned.params)} == {"connector", "language"}
    assert isinstance(tuned.chat("What?", images=[files / "0.png"], max_new_tokens=3), str)


def test_xgen_mm_is_fine_tuned(files, tmp_path):
    mmjax.hub.save(xgen(), tmp_path / "start")
    data = {"data": str(files / "answers.json"), "length": 150, "init_from": str(tmp_path / "start"), "warmup": 2}
    losses = run("xgen_mm_finetune", tmp_path / "run", steps=16, learning_rate=3e-2, **data)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    start, tuned = mmjax.load(tmp_path / "start"), mmjax.load(tmp_path / "run")
    assert tree_hash(start.params["vision"]) == tree_hash(tuned.params["vision"])
    changed = moved(start.params, tuned.params)
    assert {"connector/resampler/latents", "connector/projection/bias", "language/head/bias"} <= changed
    v = start.config.vocab_size
    kernels = [model.params["language"]["head"]["kernel"][:, v:] for model in (start, tuned)]
    np.testing.assert_array_equal(*kernels)  # rows without an id
    assert isinstance(tuned.chat("What?", images=[files / "0.png"], max_new_tokens=3), str)


def test_a_single_image_comes_first_where_its_text_lacks_it(files, tmp_path):
    def entry(text, **fields):
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]
        return {"conversations": turns, **fields}

    texts = [("what?", "<image>\nwhat?"), ("<image><image> what?", "<image>\nwhat?"), ("a <image> b", "a <image> b")]
    entries = [entry(text, image="0.png") for text, _ in texts]
    (tmp_path / "list.json").write_text(json.dumps([*entries, entry("<image>\nb")]))
    source = InstructionList(tmp_path / "list.json", files, image_first=True)
    assert [source[i]["turns"][0] for i in range(3)] == [expected for _, expected in texts]
    with pytest.raises(BadRecord, match="1 times <image> for 0 images"):
        _ = source[3]
