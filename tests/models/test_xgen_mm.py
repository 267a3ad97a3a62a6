"""xGen-MM against a restatement in PyTorch: logits, generated ids, layouts, tiles; its conversations and labels."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from golden.llava import tokenizer_of
from models.phi_text import PHI, VAULT, phi_tokenizer
from models.tiny_text import LINES, random_params
from PIL import Image
from safetensors.numpy import load_file

import mmjax
from mmjax import tree
from mmjax.channels import HALF
from mmjax.data.preprocess import ImagePreprocessing, from_hf
from mmjax.errors import MmjaxError
from mmjax.models.vision_language.network import VisionLanguageConfig
from mmjax.models.xgen_mm.index import content, token_order
from mmjax.models.xgen_mm.tasks import XGenMMModel, with_added_tokens
from mmjax.models.xgen_mm.template import ADDED, PAD, SYSTEM, Phi3Template
from mmjax.weights.files import read_weights, write_safetensors

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
SIZES = [(23, 60), (50, 11), (61, 60)]
"""Height and width: grids of 1 x 3, 3 x 1 and 2 x 2 tiles; the first two with a border."""
ROWS = [[1, 12, 50, 9, 31], [1, 50, 8, 50, 4, 17, 52, 3]]
"""Prompts with one image and two; 52 is one of the added ids."""


@pytest.fixture(scope="module")
def reference():
    from models import tiny_xgen_mm

    return tiny_xgen_mm.XGenMM()


def arrays_of(reference, prefix=""):
    return {prefix + key: tensor.numpy() for key, tensor in reference.state_dict().items()}


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    from models import tiny_xgen_mm

    folder = tmp_path_factory.mktemp("xgen")
    write_safetensors(folder / "model.safetensors", arrays_of(reference, "vlm."), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tiny_xgen_mm.CONFIG))
    return folder


@pytest.fixture(scope="module")
def model(folder) -> XGenMMModel:
    return mmjax.load(folder)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(4)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in SIZES]


def inputs_of(model, images, rows=ROWS):
    """Arguments of `forward` for rows in which one id is one image, padded on the left."""
    arrays = {"pixel_values": model.preprocess(images), "image_sizes": model.preprocess.image_sizes(images)}
    lengths = iter([len(each) for each in model.pictures(arrays)[1]])
    expanded = [[i for id in row for i in ([50] * next(lengths) if id == 50 else [id])] for row in rows]
    width = max(map(len, expanded))
    arrays["input_ids"] = np.asarray([[49] * (width - len(row)) + row for row in expanded])
    arrays["attention_mask"] = np.asarray([[0] * (width - len(row)) + [1] * len(row) for row in expanded])
    return arrays


def tensors_of(model, images):
    """What the restated forward takes for one image: tiles channels first, (width, height)."""
    tiles = [torch.as_tensor(np.moveaxis(model.preprocess.one(image), -1, 1).copy()) for image in images]
    return list(zip(tiles, [image.size for image in images]))


def test_logits_with_tiles_masks_and_the_joined_map(reference, model, images):
    arrays = inputs_of(model, images)
    pairs = tensors_of(model, images)
    with torch.no_grad():
        expected = reference(ROWS, [pairs[:1], pairs[1:]])
    outputs = model.forward(**arrays)
    assert outputs["logits"].shape[-1] == 53 and outputs["image_hidden_states"].shape == (4 + 4 + 5, 5, 32)
    for logits, mask, row in zip(np.asarray(outputs["logits"]), arrays["attention_mask"], expected):
        np.testing.assert_allclose(logits[mask == 1], row.numpy(), atol=1e-4 * np.abs(row.numpy()).max())
    # The order of tokens and the mask matter: without either the logits are others.
    index, mask = (np.asarray(value) for value in model.connector_inputs(arrays).values())
    assert (np.sort(index, None) == np.arange(index.size)).all() and not (np.diff(index) == 1).all()
    assert not mask.all() and mask[[0, 4, 8]].all()
    for name, other in (("token_index", np.arange(index.size).reshape(index.shape)), ("token_mask", mask | True)):
        changed = model.replace()
        right = changed.connector_inputs(arrays)
        changed.connector_inputs = lambda inputs, name=name, other=other, right=right: {**right, name: other}
        wrong = changed.forward(**arrays)["image_hidden_states"]
        assert np.abs(wrong - outputs["image_hidden_states"]).max() > 1e-2
        np.testing.assert_allclose(wrong[0], outputs["image_hidden_states"][0], atol=1e-5)  # a whole picture


def test_generated_ids(reference, model, images):
    arrays, pairs = inputs_of(model, images), tensors_of(model, images)
    visual = {name: arrays[name] for name in ("pixel_values", "image_sizes")}
    ids = model.generate(
        arrays["input_ids"],
        pixel_values=visual,
        attention_mask=arrays["attention_mask"],
        max_new_tokens=6,
        eos=(),
    )
    for row, each, generated in zip(ROWS, (pairs[:1], pairs[1:]), np.asarray(ids)):
        with torch.no_grad():
            x = reference.embedded(torch.as_tensor(row), each)
            expected = []
            for _ in range(6):
                expected.append(int(reference.lang_model(inputs_embeds=x[None]).logits[0, -1].argmax()))
                x = torch.cat([x, reference.lang_model.get_input_embeddings()(torch.as_tensor(expected[-1:]))])
        assert generated.tolist() == expected


@pytest.mark.parametrize("layout", ["hf", "xgen_mm"])
def test_layouts_both_ways(reference, folder, model, tmp_path, layout):
    """Bit-exact, rows without an id too; SigLIP's head is not read."""
    mmjax.export(model, tmp_path / "out", layout=layout)
    written = read_weights(tmp_path / "out" / "model.safetensors").arrays
    public = arrays_of(reference, "vlm." if layout == "hf" else "")
    assert set(written) == {key for key in public if "vision_encoder.head." not in key}
    for key in written:
        np.testing.assert_array_equal(np.asarray(written[key]), public[key])
    config_json = json.loads((tmp_path / "out" / "config.json").read_text())
    config_json.pop("mmjax", None)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config_json))
    again = mmjax.load(tmp_path / "out")
    assert again.config == model.config and again.layout == layout and again.preprocess == model.preprocess
    leaves = tree.flatten(again.params)
    assert all(np.array_equal(leaf, leaves[path]) for path, leaf in tree.flatten(model.params).items())
    assert model.notes == ()


def test_files_of_the_branch_are_read(reference, folder, model, tmp_path):
    """torch.save of a training checkpoint, and what config.json does not say."""
    torch.save({"epoch": 1, "model_state_dict": reference.state_dict()}, tmp_path / "checkpoint_0.pt")
    fields = json.loads((folder / "config.json").read_text())
    del fields["vision_encoder_config"]["anyres_grids"], fields["text_config"]["sliding_window"], fields["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = mmjax.load(tmp_path / "checkpoint_0.pt")
    assert loaded.config == model.config and "language.window=2047" in loaded.notes[0]
    fields["text_config"]["initial_tokenizer_len"] = 57
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(MmjaxError, match="initial_tokenizer_len 57 for an embedding of 56 rows"):
        mmjax.load(tmp_path / "checkpoint_0.pt")


def test_layouts_that_cannot_hold_the_model(model):
    from mmjax.models.xgen_mm.checkpoint import table

    tied = dataclasses.replace(model.config, language=dataclasses.replace(model.config.language, head_bias=False))
    with pytest.raises(MmjaxError, match=r"with a bias \(head_bias=False\)"):
        table(tied)
    other = dataclasses.replace(model.config, vision=dataclasses.replace(model.config.vision, patch_bias=False))
    with pytest.raises(MmjaxError, match="the tower is SigLIP's"):
        table(other)


def test_the_published_sizes():
    config = VisionLanguageConfig.xgen_mm()
    shapes = tree.flatten(XGenMMModel.shapes(config)["params"])
    counts = {part: sum(leaf.size for path, leaf in shapes.items() if path.startswith(part)) for part in PARTS}
    assert counts == PARTS
    assert config.tile_tokens == 128 and config.vision.grid == (27, 27)
    preprocess = XGenMMModel.default_preprocess(config, "hf")
    assert preprocess.size == (384, 384) and preprocess.mean == HALF


PARTS = {"vision": 412_987_248, "connector": 109_901_568, "language": 3_821_130_051}
"""The fact sheet has 109.9 M for the connector; the last is Phi-3-mini's 3,821,079,552, a bias and three rows."""


def test_the_original_s_preprocessor_files(model):
    fields = {"image_processor_type": "Blip3ImageProcessor", "size": [384, 384], "resize_mode": "squash"}
    fields |= {"interpolation_mode": "bicubic", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    usual = XGenMMModel.default_preprocess(VisionLanguageConfig.xgen_mm(), "hf")
    assert from_hf(fields) == usual
    assert from_hf(model.preprocess.to_hf()) == dataclasses.replace(model.preprocess, crop_rounding="floor")


# ---------------------------------------------------------------------------------------------------------------- tiles


def test_the_order_of_tokens_is_the_original_s_view():
    """torch's own view of a joined map of token numbers."""
    for rows, columns, side in ((2, 1, 3), (1, 2, 3), (2, 2, 3), (1, 3, 2), (3, 1, 2)):
        p = side * side
        tiles = p + torch.arange(rows * columns * p).view(rows, columns, side, side)
        joined = tiles.permute(0, 2, 1, 3).contiguous().view(rows * side, columns * side)
        index, mask = token_order((10, 10), (rows, columns), (side, side))
        np.testing.assert_array_equal(index[1:], joined.contiguous().view(rows * columns, p).numpy())
        np.testing.assert_array_equal(index[0], np.arange(p))
        assert mask[0].all() and mask.shape == index.shape


def test_padding_is_truncated_not_rounded():
    mask = content((100, 300), (27, 54))  # 18 of 27 rows show it: int(100 * 54 / 300) = 18, the border is 4
    assert mask[4:23].all() and not mask[:4].any() and not mask[23:].any()
    assert content((300, 100), (54, 27)).sum() == 54 * 19
    assert content((77, 77), (54, 54)).all()
    # 3 * (54 / 81) is 1.9999...8 as floats in some orders; the original's order and int() decide.
    assert content((41, 81), (27, 54))[:, 0].sum() == 27 - 2 * ((27 - int(41 * (54 / 81))) // 2)


def test_tiles_are_on_black_and_the_whole_comes_first():
    preprocess = ImagePreprocessing(4, (4, 4), mean=HALF, std=HALF, grids=((2, 1), (1, 2)))
    tiles = preprocess.to_uint8(np.full((4, 16, 3), 200, np.uint8))  # twice as wide as the grid of 1 x 2
    assert tiles.shape == (3, 4, 4, 3) and (tiles[0] == 200).all()
    assert (tiles[1:, 1:3] == 200).all() and not tiles[1:, 0].any() and not tiles[1:, 3].any()


# -------------------------------------------------------------------------------------------------------- conversations

TURNS = ("<image>\nWhat is on the table?", "A red cup.", "And the wall?", "A clock.")


@pytest.mark.skipif(not VAULT.is_file(), reason="the vault of LLaVA's texts has the tokenizer")
@pytest.mark.parametrize("rstrip", [False, True])
def test_answers_and_their_ends_are_learned(rstrip):
    tokenizer = phi_tokenizer(rstrip)
    ids, labels = Phi3Template().example(tokenizer, TURNS, True)
    assert (ids == -200).sum() == 1 and ids[0] == tokenizer.bos and (ids[1:] != tokenizer.bos).all()
    learned = tokenizer.decode(labels[labels >= 0], skip_special_tokens=False)
    line = "" if rstrip else "\n"
    assert learned.replace(" ", "") == f"Aredcup.<|end|>{line}Aclock.<|end|>{line}".replace(" ", "")
    text = Phi3Template().prompt(TURNS)
    assert text.startswith(f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n<image>\nWhat") and text.endswith("clock.<|end|>\n")
    np.testing.assert_array_equal(
        np.where(ids == -200, tokenizer.tokenizer.token_to_id("<image>"), ids), tokenizer.encode([text])[0]
    )


@pytest.mark.skipif(not VAULT.is_file(), reason="the vault of LLaVA's texts has the tokenizer")
def test_special_ids_are_never_learned_and_miscounts_mask_all():
    tokenizer = phi_tokenizer()
    added = [tokenizer.tokenizer.token_to_id(name) for name in (PAD, *ADDED)]
    assert added == list(range(tokenizer.vocab_size - 4, tokenizer.vocab_size)) and tokenizer.pad == added[0]
    _, labels = Phi3Template().example(tokenizer, ("Hi", "a <|endofchunk|> b"), False)
    assert (labels >= 0).any() and not np.isin(labels, added).any()
    _, labels = Phi3Template().example(tokenizer, ("Hi", "a <pad> b"), False)  # padding within: the counts differ
    assert (labels < 0).all()
    ids, labels = Phi3Template().example(tokenizer, TURNS, True, 60)
    assert len(ids) == 60 and (labels >= 0).any()
    bare = dataclasses.replace(
        tokenizer, tokenizer=tokenizer_of(load_file(VAULT)["inputs/sentencepiece_model"], True).tokenizer, special={}
    )
    with pytest.raises(MmjaxError, match="this one lacks <image>"):
        Phi3Template().example(bare, TURNS, True)


@pytest.fixture(scope="module")
def talker(model):
    """The same sizes with a tokenizer of bytes and a few pairs of them."""
    from mmjax.text.tokenizer import Tokenizer
    from mmjax.text.training import train_tokenizer

    trained = train_tokenizer(LINES, "byte_bpe", 300, ["<s>", *PHI])
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = with_added_tokens(Tokenizer(trained.tokenizer, special))
    c = model.config
    size = tokenizer.vocab_size - 3
    language = dataclasses.replace(c.language, vocab_size=size, pad=tokenizer.pad, eos=tokenizer.eos)
    config = dataclasses.replace(c, language=language, image_token=size)
    params = random_params(XGenMMModel, config)
    # Answers are plain text and depend on the images: see tests/models/tiny_llava.py.
    plain = [tokenizer.decode([i]).isascii() and tokenizer.decode([i]).isprintable() for i in range(size)]
    language = {**params["language"], "added_head": {"kernel": jnp.zeros((32, 3)), "bias": jnp.full(3, -9.0)}}
    bias = jnp.where(jnp.asarray(plain + [True] * c.language.unused_rows), 0.0, -99.0)
    language["head"] = {**language["head"], "bias": bias}
    params = tree.map_with_path(lambda path, leaf: 4 * leaf if "attention" in path else leaf, params)
    params["connector"]["projection"]["kernel"] *= 3
    params["language"] = {**params["language"], **{name: language[name] for name in ("head", "added_head")}}
    talker = XGenMMModel(config, params, tokenizer=tokenizer)
    return talker.replace(preprocess=model.preprocess)


def test_chats_and_answers(talker, images):
    prompt = talker.chat_prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert prompt.text == "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n" and not prompt.stop
    end = talker.tokenizer.tokenizer.token_to_id("<|end|>")
    assert end in talker.eos and talker.feature_count(images[0]) == 20
    answers = talker.answer(images[:2], ["What is it?"] * 2, max_new_tokens=5)
    assert len(answers) == 2 and "<|end|>" not in "".join(answers)
    alone = [talker.chat("<image>\nWhat is it?", images=[image], max_new_tokens=5) for image in images[:2]]
    assert answers == alone and len(set(answers)) > 1


def test_a_conversation_reuses_its_cache(talker, images):
    from mmjax.interface.conversation import Conversation

    talk = Conversation(talker, max_new_tokens=4)
    first = "".join(talk.say("What is it?", [images[0]]))
    second = "".join(talk.say("And now?", [images[1]]))
    messages = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "<image>\nAnd now?"},
    ]
    assert second == talker.chat(messages, images=images[:2], max_new_tokens=4)


def test_a_tokenizer_gets_the_tokens_of_images_once(tmp_path):
    tokenizer = phi_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = XGenMMModel.load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded is not None and loaded.vocab_size == tokenizer.vocab_size and loaded.pad == tokenizer.pad
    assert XGenMMModel.load_tokenizer(tmp_path / "none.json") is None
