"""AlbefModel: layouts both ways, its methods against a plain recomputation, initial weights of fine-tuning, sizes."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.albef import config_of
from PIL import Image

import mmjax
from mmjax import cli, tree
from mmjax.errors import MmjaxError
from mmjax.interface.answers import AnswerRules
from mmjax.models.albef.checkpoint import table
from mmjax.models.albef.finetune import AlbefAnswering, AlbefClassification, AlbefRetrieval
from mmjax.models.albef.network import AlbefConfig
from mmjax.models.albef.pretrain import AlbefPretraining
from mmjax.models.albef.start import starting_weights
from mmjax.models.albef.tasks import AlbefModel
from mmjax.models.bert.network import BertConfig
from mmjax.models.vit.network import ViTConfig
from mmjax.nn.positions import interpolate
from mmjax.text.wordpiece import SPECIAL, WordPieceTokenizer, wordpiece
from mmjax.training.checkpoint import CheckpointWriter
from mmjax.training.initialize import initialize_from
from mmjax.training.optimizer import Optimizer, adamw
from mmjax.training.queue import enqueue, write
from mmjax.training.state import create_state
from mmjax.weights.files import read_weights, write_safetensors
from mmjax.weights.table import save_table

CAPTIONS = ["a red hen on a fence", "a boat in a yellow harbour", "two hens", "the sea"]
QUESTIONS = ["What colour is the hen?", "how many boats  are there"]
ANSWERS = ["yes", "no", "red", "a hen", "two hens", "a boat"]
WORDS = sorted({word for line in [*CAPTIONS, *QUESTIONS, *ANSWERS] for word in line.lower().strip("?").split()})
VOCABULARY = [*SPECIAL, *WORDS]
TOKENIZER = WordPieceTokenizer(wordpiece({word: i for i, word in enumerate(VOCABULARY)}, lower=True))

VISION = ViTConfig(
    width=12, depth=2, heads=2, hidden=23, patch=11, image_size=(22, 22), rule="bicubic", init="timm",
)  # fmt: skip


def text(**fields: Any) -> BertConfig:
    sizes = {"vocab_size": 37, "width": 12, "depth": 2, "heads": 3, "hidden": 17, "positions": 48}
    return BertConfig(**{**sizes, "pooler": False, "cross_from": 1, "init": "normal", **fields})


COMPARED = {"embed_dim": 7, "queue": 24}
ALONE: dict[str, Any] = {"embed_dim": 0, "matching": False, "queue": 0}
FORMS = {
    "pretraining": AlbefConfig(VISION, text(mlm=True), **COMPARED),
    "retrieval": AlbefConfig(VISION, text(), by_image=True, **COMPARED),
    "entailment": AlbefConfig(VISION, text(), classes=3, **ALONE),
    "nlvr": AlbefConfig(VISION, text(depth=3), classes=2, two_images=True, **ALONE),
    "assignment": AlbefConfig(
        VISION, text(depth=3), embed_dim=7, matching=False, queue=0, two_images=True, assigning=True
    ),
    "vqa": AlbefConfig(VISION, text(), decoder=text(depth=1, cross_from=0, causal=True, mlm=True), **ALONE),
}


def variables_of(config: AlbefConfig, seed: int = 0) -> dict[str, Any]:
    """Random variables; keys of queues have unit length."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> jax.Array:
        if leaf.dtype == np.int32:
            return jnp.asarray(np.arange(leaf.size).reshape(leaf.shape) - 3 if leaf.size > 1 else 8, jnp.int32)
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path.startswith("stats/queue/"):
            return jnp.asarray(noise / np.linalg.norm(noise, axis=1, keepdims=True))
        if path.endswith("temperature"):
            return jnp.float32(0.05)
        return jnp.asarray(np.abs(noise) + 0.5 if path.endswith("scale") else 0.5 * noise)

    return tree.map_with_path(draw, AlbefModel.shapes(config))


def model_of(form: str, holds_state: bool = False) -> AlbefModel:
    config = dataclasses.replace(FORMS[form], holds_state=holds_state)
    config = config if holds_state else dataclasses.replace(config, queue=0)
    variables = variables_of(config)
    preprocess = AlbefModel.default_preprocess(config, "albef")
    return AlbefModel(config, variables["params"], variables.get("stats", {}), TOKENIZER, preprocess, "albef")


def images(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (31, 27, 3)).astype(np.uint8) for _ in range(count)]


def same(actual: Any, expected: Any) -> None:
    actual, expected = tree.flatten(actual), tree.flatten(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)


# ---------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("holds_state", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_with_the_same_bits(form: str, holds_state: bool, tmp_path: pathlib.Path):
    model = model_of(form, holds_state)
    mmjax.export(model, tmp_path / "public", layout="albef")
    mmjax.save(model, tmp_path / "own")
    for folder in ("public", "own"):
        loaded = mmjax.load(tmp_path / folder)
        assert isinstance(loaded, AlbefModel) and loaded.config == model.config
        assert loaded.layout == "albef"
        np.testing.assert_array_equal(loaded.preprocess(images(1)), model.preprocess(images(1)))
        same({"params": loaded.params, "stats": loaded.stats}, {"params": model.params, "stats": model.stats})
        assert loaded.tokenizer.pieces(CAPTIONS) == TOKENIZER.pieces(CAPTIONS)
    mmjax.export(mmjax.load(tmp_path / "own"), tmp_path / "again", layout="albef")
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "public" / name).read_bytes()


@pytest.mark.torch
@pytest.mark.parametrize("wrapped", [True, False])
def test_files_of_the_original_scripts(wrapped: bool, tmp_path: pathlib.Path):
    """Files with or without an optimizer's state, with the buffers and duplicate names that torch saves; a retrieval
    file without ids beside its queues loads with no known image id."""
    torch = pytest.importorskip("torch")
    for form in ("pretraining", "retrieval"):
        model = model_of(form, holds_state=True)
        arrays = dict(save_table(table(model.config), {"params": model.params, "stats": model.stats}))
        arrays.pop("idx_queue", None)
        for end in ("", "_m"):
            start = f"text_encoder{end}.bert." if form == "pretraining" else f"text_encoder{end}."
            arrays[f"{start}embeddings.position_ids"] = np.arange(48)[None]
            if form == "pretraining":
                cls = f"text_encoder{end}.cls.predictions."
                arrays[f"{cls}decoder.weight"] = arrays[f"{start}embeddings.word_embeddings.weight"]
                arrays[f"{cls}decoder.bias"] = arrays[f"{cls}bias"]
        tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
        folder = tmp_path / form
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"vision_heads": 2, "text_heads": 3}))
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
        content = {"model": tensors, "optimizer": {"state": {0: torch.ones(3)}}, "config": {"lr": 1e-4}, "epoch": 29}
        torch.save(content if wrapped else tensors, folder / "ALBEF.pth")
        loaded = mmjax.load(folder / "ALBEF.pth")
        stats = model.stats
        if form == "retrieval":
            stats = {**stats, "queue": {**stats["queue"], "ids": np.full((24, 1), -100)}}
        same({"params": loaded.params, "stats": loaded.stats}, {"params": model.params, "stats": stats})
        assert loaded.config == model.config
        assert loaded.tokenizer.pieces(CAPTIONS) == TOKENIZER.pieces(CAPTIONS)


@pytest.mark.parametrize("kind", ["pretrain", "retrieval", "ve", "nlvr", "vqa"])
def test_the_config_is_inferred_from_the_files_of_the_vaults(
    kind: str, golden_dir: pathlib.Path, tmp_path: pathlib.Path
):
    """The keys are those of the original code. Fields that no file contains are left out of the comparison."""
    vault_config = json.loads((golden_dir / f"albef_{kind}.json").read_text())["config"]
    tensors = read_weights(golden_dir / f"albef_{kind}.safetensors").arrays
    weights = {key.removeprefix("weights/"): tensors[key] for key in tensors if key.startswith("weights/")}
    write_safetensors(tmp_path / "model.safetensors", weights)
    heads = {
        "vision_heads": vault_config["vision_heads"],
        "text_heads": vault_config["bert_config"]["num_attention_heads"],
    }
    (tmp_path / "config.json").write_text(json.dumps(heads))
    model, expected = mmjax.load(tmp_path), config_of(f"albef_{kind}", vault_config)
    bare = {"dropout": 0.1, "attention_dropout": 0.1, "epsilon": 1e-12}
    parts = {
        part: dataclasses.replace(getattr(expected, part), **bare)
        for part in ("text", "decoder")
        if getattr(expected, part)
    }
    parts["vision"] = dataclasses.replace(expected.vision, epsilon=model.config.vision.epsilon)
    free = {name: getattr(model.config, name) for name in ("temperature", "momentum", "alpha")}
    assert model.config == dataclasses.replace(expected, **parts, **free)
    mmjax.export(model, tmp_path / "out", layout="albef")
    again = read_weights(tmp_path / "out" / "model.safetensors").arrays
    assert all(np.array_equal(again[key], weights[key]) for key in again) and len(again) > 50


def test_of_two_layers_that_share_keys_the_odd_one_counts(tmp_path: pathlib.Path):
    model = model_of("nlvr")
    arrays = save_table(table(model.config), {"params": model.params})
    one, other = (f"text_encoder.encoder.layer.{i}.crossattention.self.key.weight" for i in (1, 2))
    np.testing.assert_array_equal(arrays[one], arrays[other])
    arrays[one] = arrays[one] + 1
    write_safetensors(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.json").write_text(json.dumps({"vision_heads": 2, "text_heads": 3}))
    same(mmjax.load(tmp_path).params, model.params)


NORM = "visual_encoder.blocks.1.norm2.weight"
TABLE = "text_encoder.bert.embeddings.word_embeddings.weight"


def _nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[3] = np.nan
    return array


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop(NORM), f"missing (1):\n    {NORM}"),
        (lambda a: a.update({NORM: a[NORM][:-1]}), f"{NORM} [11]: gives [11], params/vision/encoder/block_1/norm_2"),
        (lambda a: a.update({NORM: _nan(a[NORM])}), f"{NORM} holds 1 values that are NaN or infinite"),
        (lambda a: a.update(extra=np.zeros(3)), "unexpected (1):\n    extra"),
        (lambda a: a.update({TABLE: a[TABLE].reshape(-1)}), "its config cannot be determined from it: ValueError"),
        (lambda a: [a.pop(key) for key in list(a) if "crossattention" in key], "text.cross_from=None: no layer of"),
        (lambda a: a.update({"ta_head.weight": np.zeros((3, 12))}), "assigning needs two_images"),
        (lambda a: a.pop("itm_head.bias"), "missing (1):\n    itm_head.bias"),
        (lambda a: [a.pop(key) for key in list(a) if "token_type" in key], "unknown architecture"),  # BLIP has none
    ],
    ids=["missing", "short", "nan", "extra", "flat", "blind", "assignment", "half a head", "blip"],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change: Any, message: str, tmp_path: pathlib.Path):
    model = model_of("pretraining")
    arrays = save_table(table(model.config), {"params": model.params})
    change(arrays)
    write_safetensors(tmp_path / "hostile.safetensors", {key: np.float32(array) for key, array in arrays.items()})
    (tmp_path / "config.json").write_text(json.dumps({"vision_heads": 2, "text_heads": 3}))
    with pytest.raises(MmjaxError) as error:
        mmjax.load(tmp_path / "hostile.safetensors")
    assert message in str(error.value) and "hostile.safetensors" in str(error.value)


def test_bfloat16_gives_nearly_the_same(tmp_path: pathlib.Path):
    model = model_of("retrieval")
    mmjax.export(model, tmp_path, layout="albef")
    narrow = mmjax.load(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow.params)} == {jnp.dtype("bfloat16")}
    assert narrow.forward(pixel_values=narrow.pixels(images(2)))["vision_model_output"][
        "last_hidden_state"
    ].dtype == jnp.dtype("bfloat16")
    for name in ("encode_image", "encode_text"):
        inputs = images(4) if name == "encode_image" else CAPTIONS
        np.testing.assert_allclose(getattr(narrow, name)(inputs), getattr(model, name)(inputs), atol=0.06)


# ----------------------------------------------------------------------------------------------- methods of AlbefModel


def ids_of(texts: list[str], end: bool = False) -> list[list[int]]:
    """[CLS] text, and [SEP] if `end`, for cleaned texts."""
    return [[TOKENIZER.cls, *pieces, *([TOKENIZER.sep] if end else [])] for pieces in TOKENIZER.pieces(texts)]


@functools.cache
def whole(module: Any) -> Any:
    return jax.jit(lambda variables, *args, **more: module.apply(variables, *args, **more))


def plain(model: AlbefModel, image: Any, ids: list[int], **more: Any) -> dict[str, Any]:
    """The whole network on one image and one text without padding."""
    return whole(model.module)(model.variables, model.pixels([image]), jnp.asarray([ids]), **more)


def test_features_are_those_of_single_texts_and_images_whatever_the_batch():
    model, pictures = model_of("retrieval"), images(3)
    texts = ["A red hen, on a FENCE!", "a boat in a yellow-harbour", "(two hens)"]  # cleaned: no comma, no hyphen
    singles = [plain(model, image, ids) for image, ids in zip(pictures, ids_of(CAPTIONS))]
    image, words = model.encode_image(pictures, batch_size=2), model.encode_text(texts, batch_size=2)
    np.testing.assert_allclose(image, np.concatenate([one["image_embeds"] for one in singles]), atol=2e-6)
    np.testing.assert_allclose(words, np.concatenate([one["text_embeds"] for one in singles]), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(words, axis=1), 1, rtol=1e-6)
    ids = np.asarray(ids_of(CAPTIONS[:2]))
    np.testing.assert_allclose(model.encode_text(ids), words[:2], atol=2e-6)
    # Texts of more than 30 tokens are cut to the first 30.
    whole, less, cut = model.encode_text(["hen " * 28 + word for word in ("sea", "", "sea hen")], batch_size=2)
    np.testing.assert_array_equal(whole, cut)
    assert np.abs(whole - less).max() > 2e-5  # the last of thirty


def test_matching_is_a_probability_of_each_pair():
    model, pictures = model_of("pretraining"), images(3)
    logits = [plain(model, image, ids)["itm_logits"][0] for image, ids in zip(pictures, ids_of(CAPTIONS))]
    expected = [1 / (1 + np.exp(float(row[0] - row[1]))) for row in logits]
    np.testing.assert_allclose(model.match(pictures, CAPTIONS[:3], batch_size=2), expected, rtol=1e-5)
    assert np.ptp(expected) > 0.01
    with pytest.raises(MmjaxError, match="3 images for 4 texts"):
        model.match(pictures, CAPTIONS)


def test_retrieval_in_two_stages():
    model, pictures = model_of("retrieval"), images(5)
    cosines = np.asarray(model.encode_text(CAPTIONS) @ model.encode_image(pictures).T)
    score = [[float(plain(model, p, ids)["itm_logits"][0, 1]) for p in pictures] for ids in ids_of(CAPTIONS)]
    for queries, candidates, near, scores in (
        (CAPTIONS, pictures, cosines, np.asarray(score)),
        (pictures, CAPTIONS, cosines.T, np.asarray(score).T),
    ):
        plainly, twice = model.retrieve(queries, candidates, 2), model.retrieve(queries, candidates, 2, 3)
        for row in range(len(queries)):
            order = np.argsort(-near[row])
            assert [i for i, _ in plainly[row]] == order[:2].tolist()
            short = sorted(order[:3], key=lambda i: -scores[row, i])[:2]
            assert [i for i, _ in twice[row]] == short
            np.testing.assert_allclose([s for _, s in twice[row]], scores[row, short], rtol=0, atol=2e-5)
    added = model.retrieve(CAPTIONS, pictures, 5, rerank=5, add_similarity=True)  # as BLIP does
    for row, results in enumerate(added):
        sums = np.asarray(score)[row] + cosines[row]
        assert [i for i, _ in results] == np.argsort(-sums).tolist()
        np.testing.assert_allclose([s for _, s in results], -np.sort(-sums), rtol=0, atol=2e-5)
    with pytest.raises(MmjaxError, match="images and texts"):
        model.retrieve(CAPTIONS, CAPTIONS, 2, rerank=3)


@pytest.mark.parametrize("form", ["entailment", "nlvr"])
def test_classes_of_texts_with_one_image_and_with_two(form: str):
    model, pictures, others = model_of(form), images(3), images(3, seed=1)
    second = {"other_images": others} if form == "nlvr" else {}
    predictions = model.classify_pairs(pictures, CAPTIONS[:3], **second, batch_size=2)
    for row, (image, other, ids) in enumerate(zip(pictures, others, ids_of(CAPTIONS))):
        more = {"other_images": model.pixels([other])} if form == "nlvr" else {}
        shares = np.asarray(jax.nn.softmax(plain(model, image, ids, **more)["logits"][0]))
        assert [name for name, _ in predictions[row]] == [model.class_names()[i] for i in np.argsort(-shares)]
        np.testing.assert_allclose([share for _, share in predictions[row]], -np.sort(-shares), rtol=2e-5)
    with pytest.raises(MmjaxError, match="two images" if form == "nlvr" else "one image"):
        model.classify_pairs(pictures, CAPTIONS[:3], other_images=None if form == "nlvr" else others)


def test_answers_out_of_a_list_word_by_word():
    """log p(first word) + log p(all words), of the k answers with the most probable first word."""
    model, pictures = model_of("vqa"), images(2)
    clean, sequences = ["what colour is the hen", "how many boats  are there"], ids_of(ANSWERS, end=True)
    predictions = model.answer(pictures, QUESTIONS, ANSWERS, top=2, k=4, batch_size=1)
    for image, ids, ranked in zip(pictures, ids_of(clean), predictions):
        firsts, scores = [], []
        for row in sequences:
            logits = plain(model, image, ids, decoder_ids=jnp.asarray([row]))["answer_logits"][0]
            logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
            words = [logs[position, word] for position, word in enumerate(row[1:])]
            firsts.append(words[0])
            scores.append(words[0] + sum(words))
        shortlist = np.argsort(-np.asarray(firsts), kind="stable")[:4]
        shares = np.exp(np.asarray(scores)[shortlist])
        best = np.argsort(-shares)[:2]
        assert [answer for answer, _ in ranked] == [ANSWERS[shortlist[i]] for i in best]
        np.testing.assert_allclose([share for _, share in ranked], shares[best] / shares.sum(), rtol=1e-4)
    with pytest.raises(MmjaxError, match="2 images for 1 questions"):
        model.answer(pictures, QUESTIONS[0], ANSWERS)
    with pytest.raises(MmjaxError, match="answers"):
        model.answer(pictures, QUESTIONS, [])


def test_answers_ranked_by_smoothed_losses_alone():
    """BLIP's rule: the first token is not counted twice, and each loss is 0.9 nll + 0.1 of all tokens' mean."""
    model, pictures = model_of("vqa"), images(2)
    sequences, rules = ids_of(ANSWERS, end=True), AnswerRules(label_smoothing=0.1)
    columns = model.columns(QUESTIONS, question=True)
    ranking = model.rank(model.pixels(pictures), *columns, *model.answer_columns(ANSWERS), k=6, rules=rules)
    for row, (image, ids) in enumerate(zip(pictures, ids_of(["what colour is the hen", "how many boats  are there"]))):
        losses = []
        for sequence in sequences:
            logits = plain(model, image, ids, decoder_ids=jnp.asarray([sequence]))["answer_logits"][0]
            logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
            losses.append(-sum(0.9 * logs[i, token] + 0.1 * logs[i].mean() for i, token in enumerate(sequence[1:])))
        assert ranking.indices[row].tolist() == np.argsort(losses).tolist()
        shares = np.exp(-np.sort(losses))
        np.testing.assert_allclose(ranking.probabilities[row], shares / shares.sum(), rtol=1e-4)


def test_answers_written_token_by_token():
    model, pictures = model_of("vqa"), images(3)
    questions = [*QUESTIONS, "a hen?"]
    suppress = [i for i in range(37) if i != TOKENIZER.sep and not 5 <= i < len(VOCABULARY)]  # all but words
    options = {"num_beams": 1, "max_new_tokens": 4, "suppress": tuple(suppress), "no_repeat_ngram_size": 1}
    written = model.answer(pictures, questions, batch_size=2, **options)
    for text, image, ids in zip(
        written, pictures, ids_of(["what colour is the hen", "how many boats  are there", "a hen"])
    ):
        sequence = [TOKENIZER.cls]
        while len(sequence) < 5 and sequence[-1] != TOKENIZER.sep:
            logits = plain(model, image, ids, decoder_ids=jnp.asarray([sequence]))["answer_logits"][0, -1]
            sequence.append(int(np.argmax(np.asarray(logits.at[np.asarray([*suppress, *sequence])].set(-np.inf)))))
        assert text == TOKENIZER.decode(sequence)
    assert len(set(written)) > 1
    with pytest.raises(MmjaxError, match="num_beams would have no effect"):
        model.answer(pictures, questions, ANSWERS, num_beams=2)


def test_missing_heads_and_files_are_named():
    vqa, retrieval = model_of("vqa"), model_of("retrieval")
    for call, message in (
        (lambda: vqa.encode_image(images(1)), "embed_dim=0"),
        (lambda: vqa.encode_text("a"), "embed_dim=0"),
        (lambda: vqa.retrieve(["a"], images(1)), "embed_dim=0"),
        (lambda: vqa.match(images(1), ["a"]), "no ITM head"),
        (lambda: vqa.classify_pairs(images(1), ["a"]), "no head of classes"),
        (lambda: retrieval.answer(images(1), ["a"], ["b"]), "no decoder"),
        (lambda: retrieval.match(images(1), []), "texts: there is none"),
        (lambda: retrieval.replace(tokenizer=None).encode_text("a"), r"from_vocab\('vocab.txt'\)"),
        (lambda: retrieval.forward(), "needs one of pixel_values, input_ids"),
    ):
        with pytest.raises(MmjaxError, match=message):
            call()
    small = dataclasses.replace(retrieval.config, text=text(vocab_size=23))
    with pytest.raises(MmjaxError, match="does not fit the model's of 23"):
        retrieval.replace(config=small).encode_text("a")


def test_the_command_line_finds_images_and_converts(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "300")
    model, pictures, public = model_of("retrieval"), images(3), tmp_path / "public"
    mmjax.export(model, public, layout="albef")
    for number, image in enumerate(pictures):
        (tmp_path / "images" / "all").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / "all" / f"{number}.png")
    picture = str(tmp_path / "found.png")
    flags = ["--text", "Two hens!", "--folder", str(tmp_path / "images"), "-k", "3", "--picture", picture]
    assert cli.main(["retrieve", str(public), *flags]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "all/" in line]
    for line, (number, cosine) in zip(lines, model.retrieve(["two hens"], pictures, 3)[0], strict=True):
        assert f"{number}.png" in line and f"{cosine:.3f}" in line
    assert cli.main(["convert", str(public), str(tmp_path / "own"), "--layout", "mmjax"]) == 0
    assert cli.main(["convert", str(tmp_path / "own"), str(tmp_path / "back"), "--layout", "albef"]) == 2
    assert "heads of a ViT 12 wide is in no array" in capsys.readouterr().err
    flags = ["--layout", "albef", "--lossy"]
    assert cli.main(["convert", str(tmp_path / "own"), str(tmp_path / "back"), *flags]) == 0
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert all((tmp_path / "back" / name).read_bytes() == (public / name).read_bytes() for name in names)
    assert cli.main(["classify", str(public), str(tmp_path / "images" / "all" / "0.png")]) == 2
    assert "albef does not classify" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- where training starts

METHODS = {
    "pretraining": AlbefPretraining,
    "retrieval": AlbefRetrieval,
    "entailment": AlbefClassification,
    "nlvr": AlbefClassification,
    "vqa": AlbefAnswering,
}
WIDE = dataclasses.replace(VISION, image_size=(33, 33))


def target(form: str) -> AlbefConfig:
    """With larger images, as in the original fine-tuning."""
    return dataclasses.replace(FORMS[form], vision=WIDE)


def fresh(config: AlbefConfig, form: str, batch_size: int = 8) -> Any:
    """A run's state before its first step: momentum encoders are copies, the numbers come from this test's seed."""
    row = jnp.zeros((batch_size, 5), jnp.int32)
    side = config.vision.image_size
    pixels = jnp.zeros((batch_size, *side, 3), jnp.uint8)
    batch = {"image": pixels, "image_0": pixels, "image_1": pixels, "input_ids": row, "attention_mask": row + 1}
    batch |= {"answer_ids": row[:, None], "answer_mask": row[:, None], "label": row[:, 0], "image_id": row[:, 0]}
    method, optimizer = METHODS[form](config), Optimizer(adamw(1e-3))
    state: Any = jax.eval_shape(lambda: create_state(method, optimizer, jax.random.key(1), batch))
    rng = np.random.default_rng(7)

    def draw(leaf: Any) -> np.ndarray:
        return np.zeros(leaf.shape, leaf.dtype) if leaf.dtype == np.int32 else np.float32(rng.normal(size=leaf.shape))

    params = jax.tree.map(draw, state.params)
    parts = {"params": params, "ema": {part: params[part] for part in state.ema}}
    return state.replace(**parts, queues=jax.tree.map(draw, state.queues), stats=jax.tree.map(draw, state.stats))


@pytest.mark.parametrize("holds_state", [True, False])
def test_pretraining_starts_from_a_file(holds_state: bool):
    """The momentum encoders and queues are loaded; without them they are copies and fresh queues."""
    model, before = model_of("pretraining", holds_state), fresh(FORMS["pretraining"], "pretraining")
    state, message = initialize_from(before, model.weights(), "ALBEF.pth")
    assert message == f"initialised from ALBEF.pth: {len(tree.flatten(model.params))} arrays" + (
        "; queues: image, text" if holds_state else ""
    )
    same(state.params, model.params)
    same(state.ema, model.stats["momentum"] if holds_state else {part: model.params[part] for part in before.ema})
    for name in ("image", "text"):
        keys = model.stats["queue"][name] if holds_state else before.queues[name].keys
        np.testing.assert_array_equal(state.queues[name].keys, keys)
        assert int(state.queues[name].cursor) == (8 if holds_state else 0)


@pytest.mark.parametrize("holds_state", [True, False])
@pytest.mark.parametrize("form", ["retrieval", "entailment", "nlvr", "vqa"])
def test_fine_tuning_starts_from_a_pretrained_file(form: str, holds_state: bool):
    """Every leaf of the new network and of its momentum copy is either loaded or fresh in both."""
    model, config = model_of("pretraining", holds_state), target(form)
    before = fresh(config, form)
    state, _ = initialize_from(before, starting_weights(model.weights(), config), "ALBEF.pth")
    sources = {"params": model.params, "ema": model.stats["momentum"] if holds_state else model.params}
    for kind, got in (("params", config.module_params(state.params)), ("ema", config.module_params(state.ema))):
        source, begun = tree.flatten(sources[kind]), tree.flatten(config.module_params(getattr(before, kind)))
        for path, leaf in tree.flatten(got).items():
            if path == "vision/positions":
                expected: Any = interpolate(source[path], (2, 2), (3, 3), "bicubic", 1)
            elif path.startswith("decoder/encoder/block_0/"):
                expected = source[path.replace("decoder/encoder/block_0", "text/encoder/block_1")]
            elif path.startswith("decoder/"):
                expected = source[path.replace("decoder/", "text/")]
            elif path.startswith("text/encoder/block_2/"):
                expected = source[path.replace("block_2", "block_1")]
            elif path.startswith("cls_"):
                expected = begun[path]
                np.testing.assert_array_equal(expected, tree.flatten(before.params)[path])
            else:
                expected = source[path]
            np.testing.assert_array_equal(leaf, expected, err_msg=f"{kind}/{path}")
    # The only MLM head is the decoder's, and only retrieval has projections.
    assert ("vision_proj" in state.params) == (form == "retrieval") and "mlm_bias" not in state.params["text"]


def test_image_ids_of_a_pretrained_queue_are_unknown_to_retrieval():
    """Ids and keys of a batch are written to the same rows: the queues share one cursor."""
    model, config = model_of("pretraining", True), target("retrieval")
    state, _ = initialize_from(fresh(config, "retrieval"), starting_weights(model.weights(), config), "ALBEF.pth")
    np.testing.assert_array_equal(state.queues["image"].keys, model.stats["queue"]["image"])
    np.testing.assert_array_equal(state.queues["ids"].keys, np.full((24, 1), -100))
    batch = {"image": jnp.full((8, 7), 0.5), "ids": jnp.arange(8)[:, None] + 5}
    after = {name: write(enqueue(state.queues[name], keys)) for name, keys in batch.items()}
    np.testing.assert_array_equal(after["image"].keys[8:16], batch["image"])
    np.testing.assert_array_equal(after["ids"].keys[:, 0], [-100] * 8 + list(range(5, 13)) + [-100] * 8)
    # A queue of another length is fresh, and so are its ids.
    other = dataclasses.replace(config, queue=16)
    state, _ = initialize_from(fresh(other, "retrieval"), starting_weights(model.weights(), other), "ALBEF.pth")
    assert all(int(queue.cursor) == 0 and len(queue.keys) == 16 for queue in state.queues.values())
    # The ids in a retrieval file number the images of other data.
    model = model_of("retrieval", True)
    state, _ = initialize_from(fresh(config, "retrieval"), starting_weights(model.weights(), config), "mscoco.pth")
    np.testing.assert_array_equal(state.queues["text"].keys, model.stats["queue"]["text"])
    assert (np.asarray(state.queues["ids"].keys) == -100).all()


@pytest.mark.parametrize("form", ["nlvr", "vqa"])
def test_fine_tuning_starts_from_its_own_task(form: str):
    model = model_of(form, True)
    weights = starting_weights(model.weights(), model.config)
    same(weights, {"params": model.params, "ema": model.stats["momentum"]})
    classes = dataclasses.replace(FORMS["entailment"], classes=5)
    left = starting_weights(model_of("entailment").weights(), classes)["params"]
    assert left.keys() == {"vision", "text"}  # a head of other classes


def test_pairs_of_images_start_from_text_assignment():
    """NLVR2's fine-tuning starts from pretrain_model_nlvr.pth: all but the heads and the projections."""
    model = model_of("assignment")
    weights = starting_weights(model.weights(), FORMS["nlvr"])
    expected = {name: tree for name, tree in model.params.items() if name in ("vision", "text")}
    same(weights, {"params": expected})


def test_weights_of_another_network_do_not_start_an_albef():
    config = target("retrieval")
    with pytest.raises(MmjaxError, match="not the weights of an ALBEF: they have no vision/positions, text/encoder"):
        starting_weights({"params": {"encoder": {}}}, config)
    with pytest.raises(MmjaxError, match="3 blocks, 2 of which see the image, do not become 2"):
        starting_weights(model_of("nlvr").weights(), config)
    deeper = dataclasses.replace(config, text=text(depth=3, cross_from=2))
    with pytest.raises(MmjaxError, match="not from cross_from on"):
        starting_weights(model_of("pretraining").weights(), deeper)


def test_a_run_is_loaded_without_its_counters(tmp_path: pathlib.Path):
    config = dataclasses.replace(FORMS["nlvr"])
    state = fresh(config, "nlvr")
    writer = CheckpointWriter(tmp_path)
    writer.save({"params": state.params, "stats": state.stats, "ema": state.ema, "step": np.int32(3)}, 3)
    writer.wait()
    run_config = {"system": "albef", "model": dataclasses.asdict(config)}
    (tmp_path / "config.json").write_text(json.dumps(run_config))
    loaded = mmjax.load(tmp_path)
    assert loaded.config == config and not loaded.stats
    same(loaded.params, state.params)
    mmjax.export(loaded, tmp_path / "public", layout="albef")
    same(mmjax.load(tmp_path / "public").params, state.params)


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "config, online, both",
    [
        (AlbefConfig.base(), 209_937_725, 419_873_911),
        (AlbefConfig.retrieval(), 209_560_835, 419_120_131),
        (AlbefConfig.vqa(), 290_336_058, 580_672_116),
        (AlbefConfig.entailment(), 209_758_467, 419_516_934),
        (AlbefConfig.nlvr(), 259_381_250, 518_762_500),
    ],
    ids=["pretraining", "retrieval", "vqa", "entailment", "nlvr"],
)
def test_published_sizes(config: AlbefConfig, online: int, both: int):
    shapes = AlbefModel.shapes(dataclasses.replace(config, holds_state=True))
    assert tree.count(shapes["params"]) == online
    assert tree.count(shapes["params"]) + tree.count(shapes["stats"]["momentum"]) == both
