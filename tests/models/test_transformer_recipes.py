"""The Transformer's experiments at small size: from the command's function to a loaded workdir that translates."""

import pathlib
from typing import Any

import numpy as np
import pytest

import mmjax
from mmjax.cli.evaluate import load_run, scores_of
from mmjax.errors import MmjaxError
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments"
REVERSAL: Any = load_experiment(FOLDER / "transformer_reversal.py")
EMOJI: Any = load_experiment(FOLDER / "transformer_emoji.py")
SHORT: dict[str, Any] = {"eval_every": 0, "checkpoint_every": 4, "log_every": 8, "tensorboard": False}


def test_no_held_out_string_is_trained_on():
    config = REVERSAL(examples=300, held_out=40, longest=5)
    trained, held_out = config.strings
    assert len(set(trained)) == 300 and len(set(held_out)) == 40 and not set(trained) & set(held_out)
    assert {len(text) for text in held_out} == {3, 4, 5}
    batch = next(iter(config.train_data()))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    n = int((labels != -100).sum())
    np.testing.assert_array_equal(ids[: n - 1][::-1], labels[: n - 1])
    assert ids[n - 1] == labels[n - 1] == config.network.eos and not ids[n:].any()


def test_reversal_resumes_to_the_same_bits_and_translates(tmp_path):
    fields: dict[str, Any] = {
        **SHORT,
        "examples": 200,
        "held_out": 9,
        "longest": 5,
        "width": 8,
        "depth": 1,
        "batch_size": 10,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = REVERSAL(**fields, steps=8, warmup=2)
    last = train(config, whole, experiment_file=str(FOLDER / "transformer_reversal.py"))
    assert last["val/reversal_n"] == 9 and np.isfinite(last["train/loss"])
    train(config, parts)
    newest = parts / "checkpoints" / "8"
    for file in sorted(newest.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    newest.rmdir()
    train(config, parts)
    manifests = [(run / "checkpoints" / "8" / "manifest.json").read_bytes() for run in (whole, parts)]
    assert manifests[0] == manifests[1]

    config, state, step = load_run(str(whole))
    evaluation = config.evaluations()[0]
    scores = scores_of(evaluation, state)
    assert step == 8 and scores["reversal_greedy_chrf"].value == last["val/reversal_greedy_chrf"]
    model: Any = mmjax.load(whole)
    texts = evaluation.translate(state.params, evaluation.options["greedy"])
    greedy = model.translate(config.strings[1], num_beams=1, max_new_tokens=6)
    assert greedy == texts and all(set(text) <= set("abcdefghijklmnopqrstuvwxyz") for text in texts)
    beams = model.translate(config.strings[1][0], num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert len(beams) == 2 and all(isinstance(text, str) for text in beams)


def test_emoji_names_become_batches_and_scores():
    pytest.importorskip("emoji")
    config = EMOJI(steps=2, batch_size=7, width=8, depth=1, heads=2, vocab_size=400)
    batch = next(iter(config.train_data()))
    tokenizer, shape = config.tokenizer, config.example_batch()["labels"].shape
    assert batch["input_ids"].shape == batch["labels"].shape == shape and tokenizer.vocab_size == 400
    pair = tuple(tokenizer.decode(row[row >= 0].tolist()) for row in (batch["input_ids"][3], batch["labels"][3]))
    assert pair in config.names.train
    evaluation = config.evaluations()[0]
    ids, mask = (evaluation.inputs[name] for name in ("input_ids", "attention_mask"))
    assert tokenizer.decode(ids[5].tolist()) == evaluation.sources[5] == config.names.held_out[5][0]
    assert (ids[np.arange(len(ids)), mask.sum(1) - 1] == config.network.eos).all()
    with pytest.raises(MmjaxError, match="language='xx'"):
        EMOJI(language="xx").train_data()
