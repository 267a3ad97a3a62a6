"""A network that starts from several sources, each for its part."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import mmjax
from mmjax import cli, tree
from mmjax.errors import MmjaxError
from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.tasks import AlbefModel
from mmjax.models.bert.network import BertConfig
from mmjax.models.bert.tasks import BertModel
from mmjax.models.vit.network import ViTConfig
from mmjax.models.vit.tasks import ViTModel
from mmjax.training.initial_parts import initial_parts

VISION = ViTConfig(12, 2, 2, 18, 4, (8, 8), num_classes=3, init="timm")
TEXT = BertConfig(31, 12, 2, 2, 18, 9, mlm=True, nsp=True)
NETWORK = AlbefConfig(
    dataclasses.replace(VISION, image_size=(12, 12), num_classes=0),
    dataclasses.replace(TEXT, vocab_size=33, positions=7, types=0, pooler=False, nsp=False, cross_from=1),
    embed_dim=5,
    queue=0,
)


def random_model(kind: Any, config: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    shapes = kind.shapes(config)["params"]
    return kind(config, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes))


SOURCES = {"deit": random_model(ViTModel, VISION, 1), "bert": random_model(BertModel, TEXT, 2)}


def load(name: str) -> Any:
    return SOURCES[name].weights()


def test_each_part_takes_what_its_source_has():
    """Positions are resized, a head and a pooler stay behind, words grow, and the longer position table is cut."""
    expected = AlbefModel.shapes(NETWORK)["params"]
    weights = initial_parts(load, expected, NETWORK.vision, "deit", "bert")
    taken, vit, bert = (tree.flatten(x) for x in (weights["params"], SOURCES["deit"].params, SOURCES["bert"].params))
    assert all(leaf.shape == tree.flatten(expected)[path].shape for path, leaf in taken.items())
    fresh = tree.flatten(expected).keys() - taken.keys()
    assert {path.split("/")[0] for path in fresh} == {"vision_proj", "text_proj", "temperature", "itm_head", "text"}
    assert all("cross_" in path for path in fresh if path.startswith("text/")) and len(fresh) == 17
    same = [path for path in taken if path.startswith("vision/") and path != "vision/positions"]
    assert len(same) == 2 * 16 + 5
    for path in same:
        np.testing.assert_array_equal(taken[path], vit[path.removeprefix("vision/")])
    np.testing.assert_array_equal(taken["vision/positions"][:, 0], vit["positions"][:, 0])
    words = np.asarray(taken["text/embeddings/words"])
    np.testing.assert_array_equal(words[:31], bert["embeddings/words"])
    assert 0 < np.abs(words[31:]).max() < 0.1 and words.shape == (33, 12)
    np.testing.assert_array_equal(taken["text/mlm_bias"], np.append(bert["mlm_bias"], [0, 0]))
    np.testing.assert_array_equal(taken["text/embeddings/positions"], bert["embeddings/positions"][:7])
    assert weights["origins"] == {path: "deit" if path.startswith("vision/") else "bert" for path in taken}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": dataclasses.replace(NETWORK.vision, depth=3)}, r"deit does not fit .*without encoder/block_2/"),
        ({"vision": dataclasses.replace(NETWORK.vision, hidden=20)}, r"mlp/up/kernel: want \[12, 20\], got \[12, 18\]"),
        ({"text": dataclasses.replace(NETWORK.text, depth=3)}, "bert: 2 text blocks, the network has 3"),
        ({"text": dataclasses.replace(NETWORK.text, vocab_size=30)}, r"embeddings/words: want \[30, 12\], got \[31"),
        ({"text": dataclasses.replace(NETWORK.text, positions=10)}, r"embeddings/positions: want \[10, 12\]"),
    ],
)
def test_sources_that_do_not_fit_are_named(changes: dict[str, Any], message: str):
    network = dataclasses.replace(NETWORK, **changes)
    with pytest.raises(MmjaxError, match="(?s)" + message):
        initial_parts(load, AlbefModel.shapes(network)["params"], network.vision, "deit", "bert")


RECIPE = """
import dataclasses
import numpy as np
from mmjax.models.albef.network import AlbefConfig
from mmjax.recipes.image_text import EncoderStart
from mmjax.training.image_text import MomentumDistillation
from mmjax.training.optimizer import Optimizer, sgd
from training.test_initial_parts import NETWORK

class Batches:
    def __iter__(self):
        return self
    def __next__(self):
        rng = np.random.default_rng(0)
        ids = rng.integers(4, 31, (4, 6)).astype(np.int32)
        image = rng.normal(size=(4, 12, 12, 3)).astype(np.float32)
        return {"image": image, "input_ids": ids, "attention_mask": np.ones_like(ids)}
    def get_state(self):
        return 0
    def set_state(self, state):
        pass

class Still(MomentumDistillation):
    def loss(self, params, carry, batch, rng, step, axis_name=None):
        return params["temperature"], (carry, {})

@dataclasses.dataclass(frozen=True)
class Config(EncoderStart):
    def method(self):
        return Still(NETWORK)
    def optimizer(self):
        return Optimizer(sgd(0.0, 0.0))
    def train_data(self):
        return Batches()
    def evaluations(self):
        return ()
    def model(self):
        return "albef", NETWORK
"""


def test_the_command_line_takes_them_and_says_where_each_parameter_came_from(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    for name, model in SOURCES.items():
        mmjax.save(model, tmp_path / name)
    experiment, run = tmp_path / "parts.py", tmp_path / "run"
    experiment.write_text(RECIPE)
    vision, text = (str(tmp_path / name) for name in SOURCES)
    command = ["train", str(experiment), "--steps", "1", "--batch_size", "4", "--no-tensorboard", "--workdir", str(run)]
    assert cli.main([*command, "--init_vision", vision, "--init_text", text]) == 0
    message = " ".join(capsys.readouterr().out.split())
    assert f"{vision}: 38 arrays of vision" in message and f"{text}: 41 arrays of text" in message
    origins = json.loads((run / "origins.json").read_text())
    trained: Any = mmjax.load(run)
    assert origins.keys() == tree.flatten(trained.params).keys()
    counts = {source: list(origins.values()).count(source) for source in (vision, text, "fresh")}
    assert counts[vision] == 38 and counts["fresh"] == 17 and sum(counts.values()) == len(origins)
    np.testing.assert_array_equal(trained.params["vision"]["cls"], SOURCES["deit"].params["cls"])
    both = [*command, "--init_from", vision, "--init_text", text]
    with pytest.raises(SystemExit, match="2"):
        cli.main(both)
    assert "init_from is a whole network, init_vision" in " ".join(capsys.readouterr().err.split())
