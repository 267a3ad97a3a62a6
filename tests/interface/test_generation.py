"""Generation from strings, streams and conversations, on a tiny model with known ids."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from models.tiny_text import chat_tokenizer, save_tiny_decoder, tiny_decoder

import mmjax
from mmjax import cli
from mmjax.errors import MmjaxError
from mmjax.interface.conversation import Conversation
from mmjax.interface.inputs import IMAGES_AND_TEXTS
from mmjax.models.language.network import Decoder
from mmjax.models.language.tasks import LanguageModel
from mmjax.models.t5.network import T5Config
from mmjax.models.t5.tasks import T5Model


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


def ids_of(model, text, new, **options):
    ids, _ = model.tokenizer(text, add_special_tokens=options.pop("special", True))
    return np.asarray(model.generate(ids, max_new_tokens=new, **options))


def test_texts_are_the_decoded_ids_of_each_prompt_alone(model):
    prompts = ["once upon", "which of them is yellow?", "sea"]
    texts = model.generate(prompts, max_new_tokens=7)
    for prompt, text in zip(prompts, texts):
        row = ids_of(model, prompt, 7)[0].tolist()
        ends = [row.index(eos) for eos in model.eos if eos in row]
        assert text == model.tokenizer.decode(row[: min(ends)] if ends else row)
    assert model.generate(prompts[0], max_new_tokens=7) == texts[0]


def test_several_texts_a_prompt(model):
    texts = model.generate(["once", "sea"], max_new_tokens=5, temperature=1.0, num_return_sequences=3, seed=1)
    assert [len(item) for item in texts] == [3, 3]
    assert len(set(texts[0])) > 1
    assert texts == model.generate(["once", "sea"], max_new_tokens=5, temperature=1.0, num_return_sequences=3, seed=1)
    assert texts != model.generate(["once", "sea"], max_new_tokens=5, temperature=1.0, num_return_sequences=3, seed=2)
    beams = model.generate("once", max_new_tokens=5, num_beams=3, num_return_sequences=2)
    assert len(beams) == 2 and beams[0] == model.generate("once", max_new_tokens=5, num_beams=3)


@pytest.mark.parametrize("every", [1, 4])
def test_a_stream_is_the_whole_text(model, every):
    for seed in range(3):
        whole = model.generate("once upon", max_new_tokens=12, temperature=1.0, seed=seed)
        pieces = list(model.stream("once upon", max_new_tokens=12, temperature=1.0, seed=seed, every=every))
        assert "".join(pieces) == whole and "" not in pieces


def test_a_stop_string_ends_the_text_before_it(model):
    whole = model.generate("once upon", max_new_tokens=20)
    stop = whole[5:8]
    expected = whole[: whole.index(stop)]
    assert model.generate("once upon", max_new_tokens=20, stop=[stop, "never said"]) == expected
    assert "".join(model.stream("once upon", max_new_tokens=20, stop=stop)) == expected
    ids = ids_of(model, "once upon", 20, stop=stop)
    assert stop in model.tokenizer.decode(ids[0].tolist()) and ids.shape[1] < 20


def test_a_chat_continues_the_template(model):
    messages = [{"role": "user", "content": "name three fruits"}]
    text = "<s>user\nname three fruits</s><s>assistant\n"
    row = ids_of(model, text, 6, special=False)[0].tolist()
    ends = [row.index(eos) for eos in model.eos if eos in row]
    expected = model.tokenizer.decode(row[: min(ends)] if ends else row)
    assert model.chat("name three fruits", max_new_tokens=6) == expected == model.chat(messages, max_new_tokens=6)
    assert "".join(model.stream_chat(messages, max_new_tokens=6)) == expected


def test_a_conversation_processes_only_new_tokens(model):
    talk = Conversation(model, "be brief", max_new_tokens=6)
    lengths = []
    for question in ("name three fruits", "which of them is yellow?", "the sea"):
        answer = "".join(talk.say(question))
        # The same text as a chat that starts from the whole conversation.
        messages = talk.messages[:-1]
        assert answer == model.chat(messages, max_new_tokens=6)
        assert talk.messages[-1] == {"role": "assistant", "content": answer}
        lengths.append(talk.reused)
    assert lengths[0] == 0
    # Noise seldom decodes to text that encodes to the same ids: then the turn is encoded again, with the same result.
    assert all(length >= 0 for length in lengths)


def test_a_conversation_resumes_from_its_cache(model, monkeypatch):
    """The answers encode to their own ids, as those of a trained model mostly do."""
    talk = Conversation(model, max_new_tokens=4)
    answer = model.tokenizer("the sea", add_special_tokens=False)[0][0].tolist()
    assert "".join(talk.say("name three fruits"))
    # As if the model had generated this answer: the cache ends at the answer's last token but one.
    first = model.tokenizer.chat([{"role": "user", "content": "name three fruits"}])
    ids = model.tokenizer(first, add_special_tokens=False)[0][0].tolist()
    talk.messages[-1]["content"] = "the sea"
    del answer
    read = talk._cached
    assert read[: len(ids)] == ids
    talk._cached = ids
    talk._past = talk._past._replace(mask=np.arange(talk._past.mask.shape[1])[None] < len(ids))
    reply = "".join(talk.say("which of them is yellow?"))
    assert talk.reused == len(ids) > 10
    assert reply == model.chat(talk.messages[:-1], max_new_tokens=4)


def test_a_saved_model_generates_the_same(model, tmp_path, capsys):
    save_tiny_decoder(tmp_path)
    again = mmjax.load(tmp_path)
    expected = model.generate("once upon", max_new_tokens=6)
    assert again.generate("once upon", max_new_tokens=6) == expected
    assert again.tokenizer.templates == model.tokenizer.templates
    assert cli.main(["generate", str(tmp_path), "once upon", "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == f"once upon{expected}\n"
    assert cli.main(["generate", str(tmp_path), "once upon", "sea", "--max_new_tokens", "6"]) == 0
    assert f"once upon{expected}" in capsys.readouterr().out


def test_the_command_line_chats(tmp_path, capsys, monkeypatch):
    import io

    save_tiny_decoder(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("name three fruits\n\nthe sea\n"))
    assert cli.main(["chat", str(tmp_path), "--max_new_tokens", "3"]) == 0
    output = capsys.readouterr().out
    assert output.count("\n") >= 2
    assert cli.main(["generate", str(tmp_path), "once", "--top_p", "0.5"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_models_that_cannot_chat_are_refused(model):
    bare = model.replace(tokenizer=None)
    with pytest.raises(MmjaxError, match="without a tokenizer"):
        bare.generate("once")
    with pytest.raises(MmjaxError, match="chat template"):
        Conversation(bare)
    silent = model.replace(tokenizer=type(chat_tokenizer())(chat_tokenizer().tokenizer, {"eos_token": "</s>"}))
    with pytest.raises(MmjaxError, match="no chat template"):
        silent.chat("once")
    with pytest.raises(MmjaxError, match="one text at a time"):
        model.stream("once", num_beams=2)
    with pytest.raises(MmjaxError, match="no token to go on from"):
        model.generate(["once", ""], max_new_tokens=2)


def test_a_sentencepiece_model_beside_the_weights_is_the_tokenizer(model, tmp_path):
    spm = pytest.importorskip("sentencepiece")
    sentences = iter(["once upon a time there was a sea", "name three fruits of the sea"] * 40)
    prefix = tmp_path / "pieces"
    spm.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=str(prefix), model_type="bpe", vocab_size=60, minloglevel=2
    )
    folder = tmp_path / "folder"
    mmjax.export(model.replace(tokenizer=None), folder)
    prefix.with_suffix(".model").rename(folder / "tokenizer.model")
    loaded = mmjax.load(folder)
    expected = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode("a sea of time")
    ids, _ = loaded.tokenizer("a sea of time")
    assert ids[0].tolist() == [1, *expected]  # <s> in front, as LLaMA has it
    assert isinstance(loaded.generate("a sea", max_new_tokens=3), str)


# ----------------------------------------------------------------------------------------- without prompts, with images


class SeeingModel(LanguageModel):
    """A decoder with one image token, the mean colour: how LLaVA and BLIP-2 use the interface."""

    @classmethod
    def inputs(cls, config):
        return IMAGES_AND_TEXTS

    def prompt_inputs(self, inputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        embeds = Decoder(self.config).apply(self.variables, ids, method="embed")
        colours = inputs["pixel_values"].mean((1, 2)) @ np.random.default_rng(5).normal(size=(3, embeds.shape[-1]))
        image = jnp.zeros((len(ids), 1), jnp.int32)
        return {
            "input_ids": jnp.concatenate([image, ids], 1),
            "attention_mask": jnp.concatenate([image + 1, mask], 1),
            "inputs_embeds": jnp.concatenate([colours[:, None], embeds], 1),
        }


def test_without_a_prompt_a_decoder_begins_with_bos(model):
    bos = model.tokenizer.bos
    assert bos != model.config.bos  # the tokenizer goes before a config's default
    text = model.generate(max_new_tokens=6, temperature=1.0, seed=3)
    ids = model.generate(np.full((1, 1), bos), max_new_tokens=6, temperature=1.0, seed=3)
    assert text and text == model.tokenizer.decode([i for i in ids[0].tolist() if i not in model.eos])
    assert "".join(model.stream(max_new_tokens=6, temperature=1.0, seed=3)) == text
    without = model.replace(tokenizer=None, config=dataclasses.replace(model.config, bos=bos))
    np.testing.assert_array_equal(without.generate(max_new_tokens=6, temperature=1.0, seed=3), ids)
    with pytest.raises(MmjaxError, match=r"needs prompts: .* \(bos\)"):
        without.replace(config=dataclasses.replace(model.config, bos=None)).generate()


def test_an_encoder_needs_a_prompt():
    config = T5Config(53, 14, 2, 1, 1, 5, 17, buckets=12, max_distance=23)
    with pytest.raises(MmjaxError, match="needs prompts: without them the encoder of this t5 has nothing to read"):
        T5Model(config, {}).generate()


def test_images_with_and_without_prompts(model):
    vlm = SeeingModel(model.config, model.params, tokenizer=model.tokenizer)
    pixels = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32) * 3
    texts = vlm.generate(["once upon", "sea"], pixel_values=pixels, max_new_tokens=5)
    assert texts[1] == vlm.generate("sea", images=pixels[1:], max_new_tokens=5)
    assert texts != vlm.generate(["once upon", "sea"], pixel_values=pixels[::-1], max_new_tokens=5)
    captions = vlm.generate(images=pixels, max_new_tokens=5)
    bos = np.full((2, 1), model.tokenizer.bos)
    ids = np.asarray(vlm.generate(bos, pixel_values=vlm.image_inputs(pixels), max_new_tokens=5))
    assert captions == [model.tokenizer.decode([i for i in row if i not in model.eos]) for row in ids.tolist()]
    assert len(captions) == 2 and captions[0] != captions[1]
    with pytest.raises(MmjaxError, match="give one of the two"):
        vlm.generate("sea", images=pixels, pixel_values=pixels)
    with pytest.raises(MmjaxError, match=r"pixel_values should be floats \[images, height, width, 3\]"):
        vlm.generate("sea", pixel_values=pixels[0])


def test_a_text_model_refuses_images(model):
    for images in ({"images": np.zeros((4, 4, 3), np.uint8)}, {"pixel_values": np.zeros((1, 4, 4, 3), np.float32)}):
        with pytest.raises(MmjaxError, match="language sees no images: it takes input_ids, attention_mask"):
            model.generate("sea", **images)
