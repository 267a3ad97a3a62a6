"""Training Flamingo: the loss of two sources, what moves and what does not, the data, and the recipe in small."""

import functools
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_flamingo as tiny
from PIL import Image

import mmjax
from mmjax import tree
from mmjax.data.decoding import BadRecord
from mmjax.data.interleaved import Documents, EncodeDocument, EncodePair
from mmjax.errors import MmjaxError
from mmjax.models.flamingo.config import ResamplerConfig
from mmjax.models.flamingo.network import Flamingo
from mmjax.models.flamingo.pretrain import FlamingoLM, optimizer, partition, trainable_count, unattended
from mmjax.models.flamingo.tasks import FlamingoModel
from mmjax.objectives.language import token_cross_entropy
from mmjax.text.interleaved import IGNORED
from mmjax.training.experiment import load_experiment
from mmjax.training.loop import train
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

EXPERIMENT = pathlib.Path(__file__).resolve().parent.parent.parent / "experiments" / "flamingo_pretrain.py"
STEP, RNG = jnp.int32(0), jax.random.key(0)


def started(method, chosen):
    state = jax.jit(functools.partial(create_state, method, chosen))(jax.random.key(0), tiny.batch())
    rng = np.random.default_rng(1)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), state.params)
    return state.replace(params=noisy)


def test_the_loss_is_the_weighted_sum_of_the_sources_means():
    """Against the logits of the whole network; each label belongs to the token before it."""
    method, batch = FlamingoLM(tiny.METHOD, {"documents": 1.0, "pairs": 0.3}), tiny.batch()
    params = started(method, optimizer(tiny.METHOD, optax.constant_schedule(1e-3))).params
    losses, (_, metrics) = jax.jit(lambda p: method.loss(p, Carry(), batch, RNG, STEP))(params)
    for name, weight in method.weights.items():
        pixels = method._pixels(jnp.asarray(batch[f"{name}_image"]))
        inputs = (batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"])
        logits = Flamingo(tiny.METHOD).apply({"params": params}, pixels, *inputs)["logits"][:, :-1]
        labels = batch[f"{name}_labels"][:, 1:]
        assert (labels != IGNORED).sum() > 10 and not (labels == tiny.METHOD.image_token).any()
        expected = token_cross_entropy(logits, jnp.asarray(labels)).loss
        np.testing.assert_allclose(losses[f"{name}_loss"].value, weight * expected.value, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"{name}_nll"].value, expected.value, rtol=1e-5)
    assert metrics["documents_media"].value > metrics["pairs_media"].value == 1


def test_what_moves():
    """Frozen leaves stay bit for bit and have no optimizer state; of the added ids two are trained, padding is not."""
    method = FlamingoLM(tiny.METHOD)
    chosen = optimizer(tiny.METHOD, optax.constant_schedule(1e-2))
    state = started(method, chosen)
    step, before = jax.jit(functools.partial(train_step, method, chosen)), tree.flatten(state.params)
    losses = []
    for seed in range(12):
        state, metrics = step(state, tiny.batch(seed % 2))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.97 * losses[0] and int(state.skipped.total) == 0
    after = tree.flatten(state.params)
    moved = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    trained = {path for path in after if path.startswith(("resampler/", "cross_"))} | {"language/added_embedding"}
    assert moved == trained
    rows = np.asarray(after["language/added_embedding"] != before["language/added_embedding"]).any(1)
    assert rows.tolist() == [True, True, False]  # <|endofchunk|>, <image>, padding
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.float32)
    assert moments == 2 * trainable_count(tiny.METHOD, state.params)
    labels = partition(tiny.METHOD).labels(state.params)
    assert labels["cross_1/gate"] == labels["cross_0/norm/bias"] == "decayed"
    assert labels["resampler/norm/scale"] == "trainable"


def test_images_that_no_text_attends_to_are_counted():
    """Several before one sentence: all but the last; and one that the end of the text follows."""
    starts = jnp.array([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]], bool)
    mask = jnp.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert unattended(starts, mask) == 4


# ----------------------------------------------------------------------------------------------------------------- data


def write_data(folder: pathlib.Path) -> None:
    """Nine documents of three sentences with two images each, and nine pairs."""
    documents, pairs = [], []
    words = ("the sea is blue", "once upon a time", "three fruits")
    for i in range(9):
        for j in range(2):
            Image.fromarray(tiny.images(2, seed=i)[j]).save(folder / f"{i}_{j}.png")
        infos = [{"image_name": f"{i}_{j}.png", "matched_text_index": 2 - j, "matched_sim": 0.3} for j in range(2)]
        documents.append({"text_list": list(words), "image_info": infos})
        pairs.append({"image": f"{i}_0.png", "caption": words[i % 3]})
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    (folder / "pairs.json").write_text(json.dumps(pairs))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    mmjax.save(tiny.language(), folder / "language")
    mmjax.save(tiny.clip(), folder / "clip")
    return folder


def test_documents(data):
    source, model = Documents(data / "documents.jsonl"), tiny.fresh()
    record = source[0]
    assert record["illustrated"] == (1, 2) and record["sentences"][2] == "three fruits"
    # The i-th image is the i-th <image>, whatever the order of image_info.
    first = np.asarray(Image.open(io.BytesIO(record["images"][0])))
    np.testing.assert_array_equal(first, tiny.images(2, seed=0)[1])
    encode = EncodeDocument(model.tokenizer, 48, 3, model.preprocess, flip=0.0)
    columns = encode.random_map(record, np.random.default_rng(0))
    assert columns["image"].shape == (3, tiny.SIDE, tiny.SIDE, 3) and not columns["image"][2].any()
    np.testing.assert_array_equal(columns["image"][0], model.preprocess.to_uint8(first))
    learned = columns["input_ids"][columns["labels"] != IGNORED]
    assert model.tokenizer.decode(learned, skip_special_tokens=False) == (
        "once upon a time<|endofchunk|>three fruits<|endofchunk|>"
    )
    flipped = EncodeDocument(model.tokenizer, 48, 3, model.preprocess, flip=1.0)
    other = flipped.random_map(record, np.random.default_rng(0))
    np.testing.assert_array_equal(other["image"], columns["image"][:, :, ::-1])
    pair = EncodePair(model.tokenizer, 32, model.preprocess, flip=0.0)
    columns = pair.random_map({"image": first, "text": "the sea"}, np.random.default_rng(0))
    learned = columns["input_ids"][columns["labels"] != IGNORED]
    assert model.tokenizer.decode(learned, skip_special_tokens=False) == "the sea<|endofchunk|></s>"


def test_documents_that_cannot_be_used(data, tmp_path):
    text, info = ["a", "b"], {"image_name": "x.png", "matched_text_index": 1, "matched_sim": 0.1}
    entries = [
        {"text_list": text, "image_info": [info]},
        {"text_list": text, "image_info": [{**info, "matched_text_index": 2}]},
        {"text_list": text, "image_info": [{**info, "matched_sim": 0.9}, {**info, "matched_sim": 0.8}]},
        {"text_list": text},
    ]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(each) + "\n" for each in entries))
    source = Documents(tmp_path / "bad.jsonl")
    for index, reason in enumerate(("document: no image", "list: no matched image", "list: two images of a sentence",
                                    "list: no image_info")):  # fmt: skip
        with pytest.raises(BadRecord, match=reason):
            source[index]
    model, record = tiny.fresh(), Documents(data / "documents.jsonl")[0]
    with pytest.raises(BadRecord, match="document: no image"):
        EncodeDocument(model.tokenizer, 3, 2, model.preprocess).random_map(record, np.random.default_rng(0))
    one = {**record, "illustrated": (1,), "images": record["images"][:1]}
    with pytest.raises(BadRecord, match="document: one image"):
        EncodeDocument(model.tokenizer, 48, 2, model.preprocess, single=1.0).random_map(one, np.random.default_rng(0))
    with pytest.raises(BadRecord, match="tokenizer: no added tokens"):
        EncodePair(tiny.language().tokenizer, 32, model.preprocess).random_map(
            {"image": tiny.images(1)[0], "text": "a"}, np.random.default_rng(0)
        )


# --------------------------------------------------------------------------------------------------------------- recipe


def test_the_recipe(data, tmp_path):
    """From two frozen models to a Flamingo that loads; an interrupted run ends with the same bits."""
    options = {
        "language": str(data / "language"),
        "vision": str(data / "clip"),
        "documents": str(data / "documents.jsonl"),
    }
    options |= {"pairs": str(data / "pairs.json"), "every": 1, "length": 40, "caption_length": 24, "images": 2}
    options |= {"heads": 2, "head_width": 3, "resampler": tiny.RESAMPLER, "batch_size": 4, "workers": 0, "lift": "jit"}
    options |= {
        "learning_rate": 3e-2,
        "warmup": 2,
        "steps": 20,
        "log_every": 1,
        "checkpoint_every": 10,
        "tensorboard": False,
    }
    config = load_experiment(EXPERIMENT)(**options)
    train(config, tmp_path / "whole", experiment_file=str(EXPERIMENT))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    model = mmjax.load(tmp_path / "whole")
    assert isinstance(model, FlamingoModel) and model.preprocess == tiny.clip().preprocess
    assert isinstance(model.generate("<image>", images=tiny.images(1), max_new_tokens=3), str)
    assert tree.tree_hash(model.params["vision"]) == tree.tree_hash(tiny.clip().params["vision"])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "20")
    train(config, tmp_path / "cut", experiment_file=str(EXPERIMENT))
    assert tree.tree_hash(mmjax.load(tmp_path / "cut").params) == tree.tree_hash(model.params)
    with pytest.raises(MmjaxError, match="there is nothing to train on"):
        load_experiment(EXPERIMENT)(**options | {"documents": None, "pairs": None}).train_data()


def test_scenes_are_trained_on_and_asked_about_by_shots(tmp_path):
    """Labels are the answers; an untrained model answers after 0 and 2 examples; gates and latents are options."""
    mmjax.save(tiny.language(), tmp_path / "language")
    mmjax.save(tiny.clip(), tmp_path / "clip")
    experiment = EXPERIMENT.with_name("flamingo_scenes.py")
    sizes = {"every": 1, "heads": 2, "head_width": 3, "side": tiny.SIDE, "initial_gate": 0.5}
    config = load_experiment(experiment)(
        language=str(tmp_path / "language"),
        vision=str(tmp_path / "clip"),
        **sizes,
        resampler=ResamplerConfig(1, 2, 3, latents=3),
        steps=2,
        log_every=1,
        batch_size=2,
        shots=1,
        length=150,
        queries=2,
        tested_shots=(0, 2),
        kinds=("presence", "colour"),
        tensorboard=False,
    )
    batch = next(iter(config.train_data()))
    ids, labels = batch["questions_input_ids"], batch["questions_labels"]
    assert batch["questions_image"].shape == (2, 2, tiny.SIDE, tiny.SIDE, 3)
    tokenizer, network = config.start.tokenizer, config.network
    source = config.sources()["questions"].source
    records = [source[i] for i in range(50)]
    known = {answer for record in records for answer in record["answers"]} | {"yes", "no"}
    for row, target in zip(ids, labels):
        assert (row == network.image_token).sum() == 2
        parts = tokenizer.decode(target[target >= 0].tolist(), False).split("<|endofchunk|>")
        assert len(parts) == 3 and parts[2] == "" and len(parts[0]) >= 2
        np.testing.assert_array_equal(target[target >= 0], row[target >= 0])
    assert {"yes", "no"} <= known
    assert float(config.start.params["cross_0"]["gate"]) == 0.5
    assert config.start.params["resampler"]["latents"].shape[0] == 3
    train(config, tmp_path / "run", experiment_file=str(experiment))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = {name: value for line in lines for name, value in line.items()}
    for k in (0, 2):
        assert values[f"val/shots_{k}"] == (values[f"val/shots_{k}_presence"] + values[f"val/shots_{k}_colour"]) / 2
