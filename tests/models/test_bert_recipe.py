"""experiments/bert_pretrain.py on a small folder of text: data, shapes, evaluation, assets, and resuming a run."""

import dataclasses
import shutil

import numpy as np
import pytest

import mmjax
from mmjax import tree
from mmjax.errors import MmjaxError
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

SENTENCES = ("the red hen runs to the sea", "a puppy plays by the sea", "two hens run", "it rains on the hens")


@pytest.fixture(scope="module")
def recipe(repository):
    return load_experiment(repository / "experiments" / "bert_pretrain.py")


@pytest.fixture(scope="module")
def small(recipe, tmp_path_factory):
    """A config that runs in seconds, on 7 documents."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(7):
        lines = [SENTENCES[(number + i * i) % 4] for i in range(3 + number)]
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    sizes = {"vocab_size": 61, "length": 17, "width": 6, "depth": 1, "passes": 2, "data": str(folder)}
    return recipe(steps=4, batch_size=6, warmup=1, log_every=1, eval_every=2, checkpoint_every=2, **sizes)


def test_batches_have_the_declared_shapes(small):
    static = dataclasses.replace(small, masking="static", whole_words=True)
    for config in (small, static):
        batch = next(iter(config.train_data()))
        for name, shape in config.example_batch().items():
            assert batch[name].shape == shape.shape and np.dtype(batch[name].dtype) == shape.dtype, name
        assert (batch["masked_weights"].sum(1) >= 1).all()
    twice = [next(iter(dataclasses.replace(small, passes=2).train_data())) for _ in range(2)]
    assert all(np.array_equal(*(batch[name] for batch in twice)) for name in twice[0])


def test_held_out_documents_are_not_trained_on(small):
    train_on, held_out = small.documents
    assert len(train_on) == 4 and len(held_out) == 3
    assert set(small.train_columns["document"]) == set(range(4))


def test_an_interrupted_run_resumes_bit_exactly(small, tmp_path):
    metrics = train(small, tmp_path)
    assert {"val/mlm_loss", "val/mlm_unigram_loss", "val/nsp_accuracy", "train/mlm_accuracy"} <= metrics.keys()
    bert = mmjax.load(tmp_path)
    assert bert.config == small.network and len(bert.fill_mask("the red [MASK] runs", top=3)[0]) == 3
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert train(small, tmp_path)["val/mlm_loss"] == metrics["val/mlm_loss"]
    assert tree.tree_hash(mmjax.load(tmp_path).params) == tree.tree_hash(bert.params)


def test_too_few_documents_are_refused(recipe, tmp_path):
    (tmp_path / "one.txt").write_text("a hen\n\na puppy\n")
    with pytest.raises(MmjaxError, match="2 documents; at least 4"):
        recipe(data=str(tmp_path)).train_data()
