"""LLaVA: sizes, tiles, prompts with images, chats. Against transformers: test_llava_hf.py; the original: the vaults."""

import dataclasses

import jax
import numpy as np
import pytest
from models.tiny_llava import picture, tiled, tiny_llava
from models.tiny_text import random_params, save_tiny_decoder, tiny_decoder
from PIL import Image

import mmjax
from mmjax import cli
from mmjax.adapters import load_lora
from mmjax.data.preprocess import ImagePreprocessing
from mmjax.data.tiles import best_grid, fitted
from mmjax.errors import MmjaxError
from mmjax.interface.conversation import Conversation
from mmjax.models.clip.network import CLIPConfig, CLIPTextConfig
from mmjax.models.clip.tasks import CLIPModel
from mmjax.models.language.tasks import LanguageModel
from mmjax.models.llava.parts import load_parts
from mmjax.models.llava.tasks import LlavaModel
from mmjax.models.llava.templates import TEMPLATES, template_called
from mmjax.models.vision_language.any_resolution import spatial_rows, tile_count
from mmjax.models.vision_language.network import IdentityConnector, MlpConnector, VisionLanguageConfig
from mmjax.training.lora import merge_lora
from mmjax.weights.files import read_weights, write_safetensors


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def test_published_sizes():
    params = LlavaModel.shapes(VisionLanguageConfig.llava_1_5_7b())["params"]
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    assert count["connector"] == 20_979_712 and sum(count.values()) == 7_062_902_784


def test_parts_that_do_not_fit():
    with pytest.raises(MmjaxError, match="the identity has 1024 channels for a width of 4096"):
        VisionLanguageConfig.llava_1_5_7b(connector=IdentityConnector())
    with pytest.raises(MmjaxError, match="rows of patches have no class token"):
        VisionLanguageConfig.llava_1_6_7b(class_token=True)


# ------------------------------------------------------------------------------------------------------ any resolution

SIDE = 14
TILES = ImagePreprocessing.llava_tiles(SIDE)


@pytest.mark.parametrize("size", [(14, 28), (28, 14), (9, 27), (39, 13), (30, 30), (9, 8), (61, 43), (20, 50)])
def test_features_of_tiles_are_the_image_row_by_row(size):
    """One feature a pixel: after the small picture come the rows of the image, each with a newline."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), np.uint8)
    tiles = TILES.to_uint8(image)
    grid = best_grid(size, TILES.grids, SIDE)
    assert len(tiles) == tile_count(size, TILES.grids, SIDE)
    table = np.concatenate([tiles.reshape(-1, 3), [[7, 7, 7]]])
    rows = spatial_rows(0, size, grid, (SIDE, SIDE), len(table) - 1)
    features = table[rows]
    np.testing.assert_array_equal(features[: SIDE * SIDE].reshape(SIDE, SIDE, 3), tiles[0])
    height, width = fitted(size, (grid[0] * SIDE, grid[1] * SIDE))
    lines = features[SIDE * SIDE :].reshape(int((rows == rows.max()).sum()), -1, 3)
    assert (lines[:, -1] == 7).all()
    whole = tiles[1:].reshape(*grid, SIDE, SIDE, 3).swapaxes(1, 2).reshape(grid[0] * SIDE, grid[1] * SIDE, 3)
    top, left = (whole.shape[0] - lines.shape[0]) // 2, (whole.shape[1] - lines.shape[1] + 1) // 2
    np.testing.assert_array_equal(lines[:, :-1], whole[top : top + len(lines), left : left + lines.shape[1] - 1])
    assert abs(lines.shape[0] - height) <= 1 and abs(lines.shape[1] - 1 - width) <= 1


def test_an_image_has_as_many_ids_as_features():
    """Thousands of sizes: the one count is that of the rows, which are distinct but for the newline."""
    rng = np.random.default_rng(1)
    for size in rng.integers(5, 2000, (3000, 2)).tolist():
        size = tuple(size)
        grid = best_grid(size, TILES.grids, SIDE)
        rows = spatial_rows(100, size, grid, (4, 4), 9999)
        tiles = rows[16:]
        lines = int((tiles == 9999).sum())
        if not lines:  # narrower than half a patch: nothing is left beside the border
            assert len(tiles) == 0 and max(size) / min(size) > 8
            continue
        assert len(tiles) % lines == 0 and (tiles.reshape(lines, -1)[:, -1] == 9999).all()
        inside = rows[rows < 9999]
        assert len(set(inside.tolist())) == len(inside) and inside.max() < 100 + 16 * tile_count(
            size, TILES.grids, SIDE
        )


# ------------------------------------------------------------------------------------------------------------- prompts

PROMPTS = ["USER: <image>\nname it ASSISTANT:", "once upon", "<image> and <image>: which is yellow?"]


def test_a_prompt_of_a_batch_is_continued_as_alone(model):
    images = [[picture(0)], [], [picture(1), picture(2)]]
    texts = model.generate(PROMPTS, images=images, max_new_tokens=8)
    assert texts == model.generate(PROMPTS, images=[each for item in images for each in item], max_new_tokens=8)
    for prompt, own, text in zip(PROMPTS, images, texts):
        assert model.generate(prompt, images=own, max_new_tokens=8) == text
    assert model.generate(PROMPTS[0], images=[picture(3)], max_new_tokens=8) != texts[0]
    assert "".join(model.stream(PROMPTS[2], images=images[2], max_new_tokens=8)) == texts[2]


def test_strings_are_the_ids_with_features(model):
    ids = model.encode_prompt(PROMPTS[0], [4])
    assert ids.count(-200) == 4
    pixels = model.preprocess([picture(0)])
    new = model.generate(np.asarray([ids]), pixel_values=pixels, max_new_tokens=8)[0].tolist()
    ends = [new.index(eos) for eos in model.eos if eos in new]
    text = model.tokenizer.decode(new[: min(ends)] if ends else new)
    assert model.generate(PROMPTS[0], images=[picture(0)], max_new_tokens=8) == text


def test_new_tokens_are_counted_without_the_image(model):
    for images, prompt in (([], "once"), ([picture(0)] * 9, "<image>" * 9)):
        ids = np.asarray([model.encode_prompt(prompt, [4] * len(images))])
        pixels = model.preprocess(images) if images else None
        assert model.generate(ids, pixel_values=pixels, max_new_tokens=5, eos=()).shape == (1, 5)


def test_a_stop_string_ends_an_answer(model):
    whole = model.generate(PROMPTS[0], images=[picture(0)], max_new_tokens=20)
    stop = whole[4:7]
    assert model.generate(PROMPTS[0], images=[picture(0)], max_new_tokens=20, stop=stop) == whole[: whole.index(stop)]


def test_beams_are_of_one_image_each(model):
    images = [[picture(0)], [picture(1), picture(2)]]
    texts = model.generate([PROMPTS[0], PROMPTS[2]], images=images, num_beams=3, max_new_tokens=6)
    assert texts == [
        model.generate(prompt, images=own, num_beams=3, max_new_tokens=6)
        for prompt, own in zip([PROMPTS[0], PROMPTS[2]], images)
    ]


@pytest.mark.parametrize(
    "prompts, images, message",
    [
        (PROMPTS, [[picture(0)], [picture(1)], [picture(2)]], "0 times <image> for 1 images: 'once upon'"),
        (PROMPTS[0], [picture(0)] * 2, "1 times <image> for 2 images"),
        (PROMPTS[0], None, "1 times <image> for 0 images"),
        (PROMPTS, [[picture(0)]], "lists of images for 1 prompts"),
        (None, None, "needs prompts, with <image> where an image is"),
    ],
)
def test_prompts_and_images_that_do_not_fit(model, prompts, images, message):
    with pytest.raises(MmjaxError, match=message):
        model.generate(prompts, images=images)


def test_tiles_of_images_of_any_size():
    model = tiled()
    sizes = [(8, 16), (19, 7), (12, 12)]
    images = [picture(i, *size) for i, size in enumerate(sizes)]
    lengths = [model.feature_count(image) for image in images]
    assert lengths == [len(spatial_rows(0, s, best_grid(s, model.config.grids, 8), (2, 2), 99)) for s in sizes]
    prompts = ["<image> is it?", "a <image> then <image>"]
    texts = model.generate(prompts, images=[images[:1], images[1:]], max_new_tokens=6)
    assert texts == [
        model.generate(prompts[0], images=images[:1], max_new_tokens=6),
        model.generate(prompts[1], images=images[1:], max_new_tokens=6),
    ]


# --------------------------------------------------------------------------------------------------------------- chats


def test_a_chat_continues_the_template(model):
    text = TEMPLATES["vicuna_v1"].prompt(["<image>\nname it", None])
    expected = model.generate(text, images=[picture(0)], max_new_tokens=6, stop="</s>")
    assert model.chat("name it", images=[picture(0)], max_new_tokens=6) == expected
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "name it"}]}]
    assert model.chat(messages, images=[picture(0)], max_new_tokens=6) == expected
    assert "".join(model.stream_chat(messages, images=[picture(0)], max_new_tokens=6)) == expected
    assert model.answer([picture(0), picture(1)], ["name it"] * 2, max_new_tokens=6)[0] == expected
    system = [{"role": "system", "content": "be brief"}, *messages]
    assert model.chat_prompt(system).text == "be brief USER: <image>\nname it ASSISTANT:"


PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>\n"
    "{% else %}{{ c.text }}{% endif %}{% endfor %};{% endfor %}assistant:"
)


def test_a_chat_by_the_tokenizers_template(model):
    tokenizer = dataclasses.replace(model.tokenizer, templates={"default": PARTS})
    by_tokenizer = model.replace(config=dataclasses.replace(model.config, template=""), tokenizer=tokenizer)
    prompt = by_tokenizer.chat_prompt([{"role": "user", "content": "<image>\nname it"}])
    assert prompt.text == "user: <image>\nname it;assistant:" and prompt.add_special_tokens
    assert by_tokenizer.chat("name it", images=[picture(0)], max_new_tokens=4) == model.generate(
        prompt.text, images=[picture(0)], max_new_tokens=4
    )
    with pytest.raises(MmjaxError, match="no chat template"):
        by_tokenizer.replace(tokenizer=dataclasses.replace(tokenizer, templates={})).chat("name it")
    with pytest.raises(MmjaxError, match="template='v9': there are default, v0"):
        template_called("v9")


def test_a_conversation_with_images_mid_way(model):
    talk = Conversation(model, max_new_tokens=6)
    images: list = []
    for question, new in (("name it", [picture(0)]), ("and its colour?", []), ("and this?", [picture(1)])):
        answer = "".join(talk.say(question, new))
        images += new
        assert answer == model.chat(talk.messages[:-1], images=images, max_new_tokens=6)
    assert [message["content"].count("<image>") for message in talk.messages[::2]] == [1, 0, 1]
    assert [each.length for each in talk.images] == [4, 4]


def primed(model, image):
    """A conversation whose cache ends with its first prompt, as if the model had answered what encodes to itself."""
    talk = Conversation(model, max_new_tokens=4)
    "".join(talk.say("name it", [image]))
    talk.messages[-1]["content"] = "the sea"
    ids = model.turn_ids(model.chat_prompt(talk.messages[:1]), [4])
    talk._cached = talk._cached[: len(ids)]
    talk._past = talk._past._replace(mask=np.arange(talk._past.mask.shape[1])[None] < len(ids))
    return talk, len(ids)


def test_the_cache_serves_the_same_ids_and_images_alone(model):
    talk, length = primed(model, picture(0))
    reply = "".join(talk.say("and this?", [picture(1)]))
    assert talk.reused == length
    assert reply == model.chat(talk.messages[:-1], images=[picture(0), picture(1)], max_new_tokens=4)
    other, _ = primed(model, picture(0))
    other.images = [Conversation(model)._attached(picture(5))]  # the ids stay the same
    reply = "".join(other.say("and this?", [picture(1)]))
    assert other.reused == 0
    assert reply == model.chat(other.messages[:-1], images=[picture(5), picture(1)], max_new_tokens=4)


def test_an_interrupted_answer_joins_the_conversation(model):
    talk = Conversation(model, max_new_tokens=12)
    answer = talk.say("name it", [picture(0)])
    first = next(answer)
    answer.close()
    assert talk.messages[-1] == {"role": "assistant", "content": first} and len(talk.images) == 1
    "".join(talk.say("and then?"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def test_images_of_a_text_model_are_an_error():
    with pytest.raises(MmjaxError, match="language sees no images"):
        "".join(Conversation(tiny_decoder()).say("name it", [picture(0)]))


def test_a_saved_model_is_the_same(tmp_path):
    model = tiled()
    mmjax.hub.save(model, tmp_path)
    again = mmjax.load(tmp_path)
    assert again.config == model.config and again.preprocess == model.preprocess
    assert again.chat("name it", images=[picture(0, 9, 20)], max_new_tokens=5) == model.chat(
        "name it", images=[picture(0, 9, 20)], max_new_tokens=5
    )
    assert "answer, chat, generate" in repr(again)


def test_an_id_for_images_changes_no_answer(model):
    """`<image>` is then a token of the vocabulary, and a text is encoded in one piece."""
    other = model.with_image_id()
    token = other.config.image_token
    assert other.tokenizer.tokenizer.token_to_id("<image>") == token and other.for_layout("hf") is other
    ids = other.encode_prompt(PROMPTS[2], [4, 4])
    assert [token if id == -200 else id for id in model.encode_prompt(PROMPTS[2], [4, 4])] == ids
    images = [picture(1), picture(2)]
    texts = [each.generate(PROMPTS[2], images=images, max_new_tokens=6) for each in (model, other)]
    assert texts[0] == texts[1]


def test_a_connector_without_parameters(tmp_path):
    model = tiny_llava(connector=IdentityConnector())
    mmjax.export(model, tmp_path, "llava", lossy=False)
    again = mmjax.load(tmp_path)
    assert again.config == model.config and "connector" not in again.params
    inputs = {"pixel_values": model.preprocess([picture(0)]), "input_ids": np.asarray([[1] + [-200] * 4 + [5]])}
    outputs = again.forward(**inputs)
    features = np.asarray(outputs["image_hidden_states"])[0]
    np.testing.assert_allclose(np.asarray(outputs["hidden_states"][0])[0, 1:5], features, atol=1e-6)
    with pytest.raises(MmjaxError, match="a connector of two layers"):
        mmjax.export(model, tmp_path / "hf", "hf")


def test_int8_answers_close_to_float32(tmp_path):
    model = tiny_llava()
    mmjax.hub.save(model, tmp_path)
    small = mmjax.load(tmp_path, weights="int8")
    ids = np.asarray([model.encode_prompt(PROMPTS[0], [4])])
    inputs = {"pixel_values": model.preprocess([picture(0)]), "input_ids": ids}
    exact, rounded = (np.asarray(each.forward(**inputs)["logits"]) for each in (model, small))
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


# --------------------------------------------------------------------------------------------------------------- parts


def clip_of(model):
    """A CLIP with the model's tower."""
    config = CLIPConfig(model.config.vision, CLIPTextConfig(7, 31, 12, 1, 2, 18), 7)
    return CLIPModel(config, {**random_params(CLIPModel, config), "vision": model.params["vision"]})


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_files_without_a_tower_and_projectors_alone(tmp_path, depth):
    model = tiny_llava(connector=MlpConnector(depth), pad_images=True)
    mmjax.export(model, tmp_path / "whole", "llava")
    weights = read_weights(tmp_path / "whole" / "model.safetensors")
    arrays = {key: np.array(weights.arrays[key]) for key in weights.arrays}
    config = (tmp_path / "whole" / "config.json").read_text()

    def write(name, keys, rename=lambda key: key):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        write_safetensors(tmp_path / name / "model.safetensors", {rename(key): arrays[key] for key in keys})
        return tmp_path / name

    without = write("no_tower", [key for key in arrays if "vision_tower" not in key])
    projector = [key for key in arrays if "mm_projector" in key]
    assert len(projector) == 2 * depth
    alone = write("alone", projector, lambda key: f"base_model.model.{key}")
    with pytest.raises(MmjaxError, match=r"these weights lack the vision tower .*load_parts"):
        mmjax.load(without)
    language = LanguageModel(model.config.language, model.params["language"], tokenizer=model.tokenizer)
    for loaded in (load_parts(without, clip_of(model)), load_parts(alone, clip_of(model), language)):
        assert mmjax.tree.tree_hash(loaded.params) == mmjax.tree.tree_hash(model.params)
        assert dataclasses.replace(loaded.config, language=model.config.language) == model.config
        assert loaded.preprocess.pad
    with pytest.raises(MmjaxError, match=r"model\.layers\.0"):
        load_parts(alone, clip_of(model))


def test_a_lora_folder_of_the_original(tmp_path):
    """PEFT's names, as LLaVA's stage 2 writes them, over the language model within."""
    model = tiny_llava()
    rng = np.random.default_rng(0)
    arrays = {}
    for i in range(2):
        for name, (rows, columns) in {"self_attn.q_proj": (12, 12), "mlp.down_proj": (20, 12)}.items():
            start = f"base_model.model.model.layers.{i}.{name}"
            arrays[f"{start}.lora_A.weight"] = rng.normal(size=(3, rows)).astype(np.float32)
            arrays[f"{start}.lora_B.weight"] = rng.normal(size=(columns, 3)).astype(np.float32)
    write_safetensors(tmp_path / "adapter_model.safetensors", arrays)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 6}')
    adapted = load_lora(model, tmp_path, layout="llava")
    merged = merge_lora(adapted.params)
    kernel = merged["language"]["block_1"]["mlp"]["down"]["kernel"]
    a, b = (arrays[f"base_model.model.model.layers.1.mlp.down_proj.lora_{x}.weight"] for x in "AB")
    expected = np.asarray(model.params["language"]["block_1"]["mlp"]["down"]["kernel"]) + 2 * (b @ a).T
    np.testing.assert_allclose(kernel, expected, atol=1e-5)
    assert mmjax.tree.tree_hash(merged["vision"]) == mmjax.tree.tree_hash(model.params["vision"])


# ---------------------------------------------------------------------------------------------------- the command line


def test_chat_on_the_command_line(model, tmp_path, monkeypatch, capsys):
    mmjax.hub.save(model, tmp_path / "model")
    for i in (0, 1):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    lines = iter(["name it", f"/image {tmp_path / '1.png'}", "and this?"])

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    flags = ["--image", str(tmp_path / "0.png"), "--max_new_tokens", "5"]
    assert cli.main(["chat", str(tmp_path / "model"), *flags]) == 0
    talk = Conversation(model, max_new_tokens=5)
    expected = ["".join(talk.say("name it", [picture(0)])), "".join(talk.say("and this?", [picture(1)]))]
    assert capsys.readouterr().out == "\n".join(expected) + "\n"


def test_ctrl_c_stops_an_answer(model, tmp_path, monkeypatch, capsys):
    mmjax.hub.save(model, tmp_path)
    lines = iter(["name it", "and then?"])
    pieces = Conversation.say
    calls = []

    def say(self, *arguments, **options):
        calls.append(self)
        for i, piece in enumerate(pieces(self, *arguments, **options)):
            if len(calls) == 1 and i == 1:
                raise KeyboardInterrupt
            yield piece

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Conversation, "say", say)
    monkeypatch.setattr("builtins.input", read)
    assert cli.main(["chat", str(tmp_path), "--max_new_tokens", "6"]) == 0
    messages = calls[0].messages
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    first, second = capsys.readouterr().out.splitlines()
    assert first and messages[1]["content"].startswith(first) and messages[3]["content"] == second


def test_the_command_line_refuses_images_of_a_text_model(tmp_path, capsys):
    save_tiny_decoder(tmp_path)
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    assert cli.main(["chat", str(tmp_path), "--image", str(tmp_path / "0.png")]) == 2
    assert "--image: language sees no images" in capsys.readouterr().err
