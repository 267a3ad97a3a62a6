"""Evaluations inside a training run: their compiled functions take the training state and are traced once."""

import dataclasses
import pathlib

import numpy as np
import pytest

from mmjax.evaluation.knn import KNNEvaluation
from mmjax.evaluation.retrieval import RetrievalEvaluation
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train
from mmjax.training.metrics import read_metrics

TOY = load_experiment(pathlib.Path(__file__).parent.parent / "faults" / "toy_experiment.py")
TRACED: list[tuple[int, ...]] = []


def encode(params, state, inputs):
    TRACED.append(inputs.shape)
    return inputs @ params["stem"]["kernel"] + state.ema["stem"]["bias"]


@dataclasses.dataclass(frozen=True)
class Judged(TOY):
    steps: int = 6
    eval_every: int = 2
    checkpoint_every: int = 0

    def evaluations(self):
        x = np.random.default_rng(0).standard_normal((13, 5)).astype(np.float32)
        retrieval = RetrievalEvaluation(
            encode_image=encode,
            encode_text=lambda p, s, x: encode(p, s, x["x"]),
            images=x,
            texts={"x": x},
            batch_size=13,
        )
        labels = np.arange(13) % 2
        knn = KNNEvaluation(encode=encode, train_images=x, train_labels=labels, ks=(3,), final_step=self.steps)
        return (retrieval, knn)


@pytest.mark.parametrize("lift", ["jit", "pmap", "mesh"])
def test_metrics_of_every_evaluation_are_logged(tmp_path, lift):
    TRACED.clear()
    last = train(Judged(lift=lift), tmp_path)
    assert last["val/image_to_text_R@1"] == last["val/text_to_image_R@10"] == 100
    lines = [line for line in read_metrics(tmp_path) if "val/knn_top1" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["val/knn_top1_low"] <= line["val/knn_top1"] <= line["val/knn_top1_high"] for line in lines)
    assert lines[0]["val/knn_n"] == 13
    assert len(TRACED) == 3  # image, text, and the images of kNN
