"""The recipe that fine-tunes a language model, with adapters and in full, from a folder to an exported folder."""

import json
import pathlib

import jax
import numpy as np
import pytest
from models.tiny_text import save_tiny_decoder, tiny_decoder

import mmjax
from mmjax.errors import MmjaxError
from mmjax.models.language.pretrain import CausalLM
from mmjax.objectives.language import next_tokens, token_cross_entropy
from mmjax.training.checkpoint import load_params
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train
from mmjax.training.lora import LoRAConfig

EXPERIMENT = pathlib.Path(__file__).resolve().parent.parent.parent / "experiments" / "finetune_language.py"
SMALL = {"batch_size": 4, "length": 48, "log_every": 1, "held_out": 0.25, "tensorboard": False}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    save_tiny_decoder(folder)
    talks = folder / "talks.jsonl"
    dialogues = [("name three fruits", "sea time"), ("which of them is yellow?", "blue"), ("sea?", "the sea is blue")]
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in dialogues * 6
    ]
    talks.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(start, workdir, **changes):
    config = load_experiment(EXPERIMENT)(
        **SMALL | {"init_from": str(start), "data": str(start / "talks.jsonl"), **changes}
    )
    last = train(config, workdir, experiment_file=str(EXPERIMENT))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return last, [line["train/loss"] for line in lines if "train/loss" in line]


def test_adapters_learn_the_dialogues_and_nothing_else_changes(start, tmp_path):
    lora = LoRAConfig(("block_*/**",), 8)
    last, losses = run(start, tmp_path, steps=60, learning_rate=5e-2, lora=lora)
    assert losses[-1] < 0.88 * losses[0]
    assert last["val/perplexity"] < last["val/perplexity_chance"]
    params = load_params(tmp_path)["params"]
    before = tiny_decoder().params
    for block in ("block_0", "block_1"):
        adapter = params[block]["attention"]["q"]
        np.testing.assert_array_equal(adapter["kernel"], before[block]["attention"]["q"]["kernel"])
        assert np.abs(adapter["lora_b"]).max() > 0
    np.testing.assert_array_equal(params["token_embedding"], before["token_embedding"])
    tuned = mmjax.load(tmp_path)
    branch = params["block_0"]["attention"]["q"]
    merged = branch["kernel"] + branch["lora_scale"] * branch["lora_a"] @ branch["lora_b"]
    np.testing.assert_allclose(tuned.params["block_0"]["attention"]["q"]["kernel"], merged, rtol=1e-6)
    assert tuned.chat("sea?", max_new_tokens=8) != mmjax.load(start).chat("sea?", max_new_tokens=8)


def test_everything_learns_from_plain_text(start, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("The sea is blue. Once upon a time there was a fruit. " * 40)
    _, losses = run(start, tmp_path / "run", steps=60, data=str(corpus), tune="all", learning_rate=3e-2)
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_the_mean_over_what_is_learned():
    model = tiny_decoder()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (3, 11)).astype(np.int32)
    labels = np.where(rng.random((3, 11)) < 0.4, ids, -100).astype(np.int32)
    method = CausalLM(model.config)
    loss, (_, metrics) = method.loss(model.params, None, {"input_ids": ids, "labels": labels}, jax.random.key(0), 0)
    expected = token_cross_entropy(model.forward(input_ids=ids)["logits"], next_tokens(jax.numpy.asarray(labels)))
    np.testing.assert_allclose(loss.value, expected.loss.value, rtol=1e-5)
    assert loss.count == (labels[:, 1:] != -100).sum()
    assert metrics["tokens_per_text"].value == (labels[:, 1:] != -100).sum() / 3


def test_what_cannot_be_tuned_is_refused(start):
    config = load_experiment(EXPERIMENT)
    with pytest.raises(MmjaxError, match="--init_from MODEL"):
        config().method()
    with pytest.raises(MmjaxError, match="held_out=0"):
        _ = config(init_from=str(start), data=str(start / "talks.jsonl"), length=48, held_out=0.0).sequences
