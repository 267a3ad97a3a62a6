"""BLIP-2's second stage of pre-training: frozen parts, labels, and the recipe from a first stage to captions."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_blip2
import tiny_blip2_language as tiny
from PIL import Image

import mmjax
from mmjax import tree
from mmjax.data.decoding import BadRecord
from mmjax.errors import MmjaxError
from mmjax.models.blip2_language.start import FROZEN_PARTS
from mmjax.models.vision_language.pretrain import PrefixLM
from mmjax.recipes.blip2 import EncodeAfterQueries
from mmjax.training.checkpoint import load_params
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.partition import Partition
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

EXPERIMENT = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "blip2_stage2.py"
FIRST_QUERIES = tiny.FIRST.queries
KINDS = pytest.mark.parametrize("kind", tiny.KINDS)


def test_the_frozen_parts_cost_nothing_and_the_queries_learn():
    """No gradient, no optimizer state, the same bits after the steps, in bfloat16 too; dropout in the queries alone."""
    kind = "t5"
    config = dataclasses.replace(tiny.dropped(tiny.network(kind)), vision_dtype="bfloat16", language_dtype="bfloat16")
    method, optimizer = PrefixLM(config), Optimizer(adamw(1e-2), Partition(FROZEN_PARTS))
    batch, params = tiny.batch(kind), tree.flatten(tiny.model(kind).params)
    # The language model is random: it can learn to prefer one id.
    batch["labels"] = np.where(batch["labels"] < 0, -100, 40)
    half = ("vision/encoder", "vision/patch", "language/")
    params = {path: leaf.astype(jnp.bfloat16) if path.startswith(half) else leaf for path, leaf in params.items()}
    shapes = jax.eval_shape(lambda rng: create_state(method, optimizer, rng, batch), jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.replace(rng=jnp.zeros(())))
    state = state.replace(params=tree.unflatten(params), rng=jax.random.key(1))
    state = state.replace(opt_state=optimizer.init(state.params))
    moments = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in
               jax.tree.leaves_with_path(state.opt_state)]  # fmt: skip
    assert not any("language" in name or "vision/encoder" in name for name in moments)
    assert any("vision/norm" in name for name in moments) and any("queries" in name for name in moments)
    before, losses = {path: np.asarray(leaf) for path, leaf in params.items()}, []
    step = jax.jit(functools.partial(train_step, method, optimizer))
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < losses[0] - 0.1, losses
    labels = int((batch["labels"] >= 0).sum())
    assert float(metrics["supervised_tokens"]) == pytest.approx(labels / 8)
    unused = {path for path in before if "k/bias" in path}  # which has no effect
    for path, leaf in tree.flatten(state.params).items():
        trained = path.startswith(("connector/", "vision/norm/"))
        assert leaf.dtype == before[path].dtype, path
        assert path in unused or np.array_equal(leaf, before[path]) != trained, path


@KINDS
def test_the_loss_is_the_cross_entropy_of_the_models_logits(kind):
    """Of a decoder shifted once; of an encoder-decoder the labels of the decoder's own positions."""
    model, batch = tiny.model(kind), tiny.batch(kind)
    loss = jax.jit(PrefixLM(model.config).loss)(model.params, Carry(), batch, jax.random.key(0), jnp.int32(0))[0].value
    ids, labels = batch["input_ids"].copy(), batch["labels"]
    ids[:, : tiny.FIRST.queries] = model.config.image_token
    others = {}
    if kind == "t5":
        start, before = np.full((8, 1), model.config.language.start), np.where(labels < 0, 0, labels)[:, :-1]
        others["decoder_input_ids"] = np.concatenate([start, before], axis=1)
    outputs = model.forward(batch["image"][:, 0], ids, batch["attention_mask"], **others)
    log_probs = np.asarray(jax.nn.log_softmax(outputs["logits"]))
    if kind == "opt":
        log_probs, labels = log_probs[:, :-1], labels[:, 1:]
    rows, columns = np.nonzero(labels >= 0)
    assert loss == pytest.approx(-log_probs[rows, columns, labels[rows, columns]].mean(), rel=1e-5)


# --------------------------------------------------------------------------------------------------------------- texts


def encoded(kind: str, text: str, length: int = 9, seed: int = 0, **fields: Any) -> dict[str, Any]:
    tokenizer = tiny.model(kind).tokenizer
    encode = EncodeAfterQueries(tokenizer, 3, length, encodes=kind == "t5", **fields)
    record = {"text": text, "image": np.zeros((8, 8, 3), np.uint8)}
    return encode.random_map(record, np.random.default_rng(seed))


def test_a_decoder_learns_the_text_and_its_line_end():
    tokenizer = tiny.model("opt").tokenizer
    ids = tokenizer.encode(["the sea\n"])[0]
    row = encoded("opt", "the sea")
    assert row["image"].shape == (1, 8, 8, 3) and row["feature_index"].tolist() == [0, 1, 2] + [-1] * 9
    assert row["input_ids"].tolist() == [0, 0, 0, *ids] + [tokenizer.pad] * (9 - len(ids))
    assert row["labels"].tolist() == [-100] * 3 + ids + [-100] * (9 - len(ids)) and ids[-1] == tokenizer.eos[0]
    assert row["attention_mask"].tolist() == [1] * (3 + len(ids)) + [0] * (9 - len(ids))
    prompt = len(tokenizer.encode(["once upon"])[0])
    row = encoded("opt", "the sea", 20, prompt="once upon")
    whole = tokenizer.encode(["once upon the sea\n"])[0]
    assert row["labels"].tolist() == [-100] * (3 + prompt) + whole[prompt:] + [-100] * (20 - len(whole))
    assert encoded("opt", "the sea is blue", 2)["labels"].tolist() == [-100] * 3 + tokenizer.encode(["the sea"])[0][:2]
    with pytest.raises(BadRecord, match=r"no label .length=2 ends before 'the sea'"):
        encoded("opt", "the sea", 2, prompt="once upon a time there was")


def test_an_encoder_decoder_gets_the_prompt_or_the_beginning():
    tokenizer = tiny.model("t5").tokenizer
    decode = tokenizer.decode
    row = encoded("t5", "the sea is blue", 20)
    assert decode(row["labels"][row["labels"] >= 0]) == "the sea is blue"
    assert row["attention_mask"].sum() == 3 + len(tokenizer.encode([""])[0]) and row["labels"].shape == (20,)
    cuts = set()
    for seed in range(20):
        row = encoded("t5", "the sea is blue", 20, seed, split=True)
        first = decode(row["input_ids"][3 : int(row["attention_mask"].sum())])
        rest = decode(row["labels"][row["labels"] >= 0])
        assert f"{first} {rest}".strip() == "the sea is blue" and rest
        cuts.add(len(first.split()))
    assert cuts == {0, 1, 2, 3}


# ---------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A saved first stage, two language models, and five captions of drawings."""
    folder = tmp_path_factory.mktemp("blip2")
    mmjax.hub.save(tiny_blip2.model(tiny.FIRST), folder / "first")
    for kind in tiny.KINDS:
        mmjax.hub.save(tiny.language(kind), folder / kind)
    rng, entries = np.random.default_rng(0), []
    for i, word in enumerate(["red", "blue", "yellow", "once", "fruit"]):
        Image.fromarray(rng.integers(0, 256, (11, 9, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        entries.append({"image": f"{i}.png", "caption": f"The {word} sea!"})
    (folder / "train.json").write_text(json.dumps(entries))
    return folder


def recipe(parts: pathlib.Path, kind: str, **fields: Any) -> Any:
    small: dict[str, Any] = {"steps": 12, "batch_size": 4, "examples": 5, "workers": 0, "lift": "jit", "size": 8}
    small |= {"length": 8, "tensorboard": False, "log_every": 1, "checkpoint_every": 0, "warmup": 1}
    small |= {"data": str(parts), "images": str(parts), "files": ("train.json",), "learning_rate": 3e-2}
    small |= {"init_from": str(parts / "first"), "init_language": str(parts / kind), "tower": None, "language": None}
    return load_experiment(EXPERIMENT)(**small | fields)


@KINDS
def test_batches_have_the_shapes_of_the_examples(kind, parts):
    config = recipe(parts, kind)
    batch = next(iter(config.train_data()))
    for column, shape in config.example_batch().items():
        assert (batch[column].shape, batch[column].dtype) == (shape.shape, shape.dtype), column


def test_from_a_first_stage_to_captions(parts, tmp_path, capsys):
    """A decoder; over an encoder-decoder the frozen parts and the lifts are tested above and in test_every_lift.py."""
    config, kind = recipe(parts, "opt"), "opt"
    train(config, tmp_path, experiment_file=str(EXPERIMENT))
    printed = capsys.readouterr().out
    assert f"{parts / 'first'}: " in printed and "of connector, vision" in printed and "of language" in printed
    assert "fresh: connector/projection" in printed
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert np.mean(losses[-3:]) < losses[0] - 0.02, losses
    assert json.loads((tmp_path / "config.json").read_text())["experiment"]["init_from"] == str(parts / "first")
    params, first = load_params(tmp_path)["params"], mmjax.load(parts / "first").params
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), first["vision"]["encoder"])
    kernel = "block_0/attention/q/kernel"
    stored, expected = (tree.flatten(each)[kernel] for each in (params["vision"]["encoder"], half))
    np.testing.assert_array_equal(np.asarray(stored, np.float32), np.asarray(expected, np.float32))
    language = mmjax.load(parts / kind, dtype="bfloat16").params
    assert tree.tree_hash(params["language"]) == tree.tree_hash(language)
    model = mmjax.load(tmp_path)
    assert model.system == "blip2_language" and model.preprocess == config.preprocess
    assert model.tokenizer.decode(model.eos) == "\n"
    assert isinstance(model.caption([parts / "0.png"], max_length=5)[0], str)


def test_sources_that_do_not_fit_are_refused(parts):
    with pytest.raises(MmjaxError, match="--init_from RUN: the first stage"):
        _ = recipe(parts, "opt", init_from=None).first_stage
    with pytest.raises(MmjaxError, match="--init_language MODEL: the frozen language model"):
        _ = recipe(parts, "opt", init_language=None).language_model
    with pytest.raises(MmjaxError, match="opt: a language, not a first stage of BLIP-2"):
        _ = recipe(parts, "opt", init_from=str(parts / "opt")).network
    with pytest.raises(MmjaxError, match="first: a blip2, not a language model with a tokenizer"):
        _ = recipe(parts, "opt", init_language=str(parts / "first")).network
    wrong = r"first does not fit this run's --tower: vision.width 18 \(expected 1408\); .* queries 5 \(expected 32\); "
    with pytest.raises(MmjaxError, match=wrong + "--tower None takes any"):
        _ = recipe(parts, "opt", tower="eva_g", size=28).network
    with pytest.raises(MmjaxError, match=r"vision.image_size \(8, 8\) \(expected \(16, 16\)\); see --size"):
        _ = recipe(parts, "opt", size=16).network
    with pytest.raises(MmjaxError, match="t5: a T5Config; --language expects a DecoderConfig"):
        _ = recipe(parts, "t5", language="opt_2_7b").network
    with pytest.raises(MmjaxError, match="--tower None and --language None: the sizes are those of --init_from"):
        _ = recipe(parts, "opt", init_from=None).network


def test_the_published_sizes_need_no_sources():
    config = load_experiment(EXPERIMENT)()
    assert (config.network.vision.width, config.network.language.width, config.network.tile_tokens) == (1408, 2560, 32)
    assert config.example_batch()["labels"].shape == (1024, 64)
    t5 = load_experiment(EXPERIMENT)(language="flan_t5_xl")
    assert t5.network.language.act == "gelu" and t5.example_batch()["labels"].shape == (1024, 32)


def test_fine_tuning_for_captions_at_another_size(parts, tmp_path):
    """The image encoder is trained too; captions follow the prompt."""
    mmjax.hub.save(tiny.model("opt"), parts / "second")
    file = EXPERIMENT.with_name("blip2_caption.py")
    small: dict[str, Any] = {"steps": 2, "batch_size": 4, "examples": 5, "workers": 0, "lift": "jit", "size": 12}
    small |= {"length": 14, "tensorboard": False, "checkpoint_every": 0, "warmup": 1, "learning_rate": 1e-2}
    small |= {"data": str(parts), "images": str(parts), "files": ("train.json",)}
    config = load_experiment(file)(**small, init_from=str(parts / "second"))
    row = next(iter(config.train_data()))
    masked = FIRST_QUERIES + len(config.tokenizer.encode(["a photo of"])[0])
    assert (row["labels"][:, :masked] == -100).all() and (row["labels"][:, masked] >= 0).all()
    train(config, tmp_path, experiment_file=str(file))
    tuned, start = mmjax.load(tmp_path), tiny.model("opt")
    assert tuned.config.vision.image_size == (12, 12) and tuned.params["vision"]["positions"].shape[-2] == 10
    kernels = ("vision/encoder/block_0/mlp/up/kernel", "connector/projection/kernel", "language/block_0/mlp/up/kernel")
    moved = [not np.array_equal(*(tree.flatten(each.params)[path] for each in (tuned, start))) for path in kernels]
    assert moved == [True, True, False]
    with pytest.raises(MmjaxError, match="first: a blip2, not a second stage"):
        _ = load_experiment(file)(**small, init_from=str(parts / "first")).network
