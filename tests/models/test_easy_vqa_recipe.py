"""BLIP's small recipe of answers about easy-VQA, in tiny: trained, evaluated, loaded, and with blank images."""

import pathlib
from typing import Any

import numpy as np
import pytest

import mmjax
from mmjax.data.easy_vqa import EasyVqa, easy_vqa_answers
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train

FILE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "blip_easy_vqa.py"


def tiny(**fields: Any) -> Any:
    sizes = {"patch": 32, "width": 32, "vision_depth": 1, "text_depth": 1, "warmup": 1, "tensorboard": False}
    return load_experiment(FILE)(**sizes | fields)


def test_answers_of_a_run_and_of_its_loaded_model_are_the_same(tmp_path: pathlib.Path):
    pytest.importorskip("easy_vqa")
    config = tiny(batch_size=64, test_questions=128, learning_rate=3e-3, steps=60)
    last = train(config, tmp_path, experiment_file=str(FILE))
    # Of the yes and no questions it answers as their most frequent answer does, before it uses images.
    assert last["val/majority_accuracy"] == pytest.approx(66, abs=6) and last["val/vqa_accuracy"] > 55
    assert last["val/vqa_accuracy_question_presence"] == last["val/majority_accuracy_question_presence"]

    model: Any = mmjax.load(tmp_path)
    test = EasyVqa("test")
    records = [test[index] for index in range(128)]
    images, questions = [r["image"] for r in records], [r["text"] for r in records]
    answers = model.answer(images, questions, easy_vqa_answers(), batch_size=128)
    right = [best[0][0] == record["answers"][0] for best, record in zip(answers, records)]
    assert last["val/vqa_accuracy"] == pytest.approx(100 * np.mean(right))


def test_blank_images_are_all_the_same():
    pytest.importorskip("easy_vqa")
    for images, equal in (("shown", False), ("blank", True)):
        config = tiny(images=images)
        batch = next(iter(config.train_data()))
        assert (batch["image"] == 128).all() == equal
        # [CLS] answer [SEP]: each answer is one piece.
        ids = batch["answer_ids"][:, 0]
        assert set(ids[:, 0]) == {config.tokenizer.cls} and set(ids[:, 2]) == {config.tokenizer.sep}
