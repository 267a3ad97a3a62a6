"""BERT: sizes, network, method, and the methods that call its heads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmjax
from mmjax import hub, tree
from mmjax.errors import MmjaxError
from mmjax.models.bert.checkpoint import HF
from mmjax.models.bert.network import Bert, BertConfig
from mmjax.models.bert.pretrain import BERT
from mmjax.models.bert.tasks import BertModel
from mmjax.text.answer_spans import Window, best_answers, windows
from mmjax.text.masking import Masking
from mmjax.text.training import train_wordpiece
from mmjax.text.wordpiece import WordPieceTokenizer
from mmjax.training.accumulate import batch_gradient
from mmjax.training.method import loss_value
from mmjax.training.optimizer import Optimizer, bert_adamw, matrices_only, warmup_linear
from mmjax.training.state import Carry, create_state
from mmjax.training.step import train_step

TINY = BertConfig(53, 35, 1, 5, 41, 19, mlm=True, nsp=True)
EMPTY = Carry()
TEXTS = ("the red hen runs", "a puppy plays by the sea", "two hens run")

COUNTS = {
    "base": (BertConfig.base(), 109_482_240),
    "base cased": (BertConfig.base(vocab_size=28996), 108_310_272),
    "large": (BertConfig.large(), 335_141_888),
    "multilingual": (BertConfig.base(vocab_size=119_547), 177_853_440),
    "minilm 6": (BertConfig.minilm(), 22_713_216),
    "minilm 12": (BertConfig.minilm(12), 33_360_000),
    "tiny": (BertConfig.tiny(), 4_385_920),
    "mini": (BertConfig.small(4, 256), 11_170_560),
    "medium": (BertConfig.small(8, 512), 41_373_184),
}
"""Parameters of encoder and pooler (shared/spec/bert.md, section 1)."""


def model(config: BertConfig, seed: int = 3, tokenizer: WordPieceTokenizer | None = None) -> BertModel:
    """Every leaf is random."""
    rng = np.random.default_rng(seed)
    arrays = {
        path: (0.4 * rng.normal(size=leaf.shape) + path.endswith("scale")).astype(np.float32)
        for path, leaf in tree.flatten(BertModel.shapes(config)["params"]).items()
    }
    return BertModel(config, tree.unflatten(arrays), tokenizer=tokenizer)


def batch(size: int = 6, length: int = 17) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    lengths = rng.integers(7, length + 1, size)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(5, 53, (size, length)).astype(np.int32) * mask
    hidden = Masking(53, 4, (), rate=0.3, limit=5).mask_all(ids, lengths, seed=1)
    types = (np.arange(length) > 3).astype(np.int32) * mask
    return hidden | {"attention_mask": mask, "token_type_ids": types, "next_label": np.arange(size, dtype=np.int32) % 2}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
    config, count = COUNTS[name]
    assert tree.count(BertModel.shapes(config)["params"]) == count


@pytest.mark.parametrize(
    "fields, message",
    [({"nsp": True, "pooler": False}, "need the pooler"), ({"classes": 2, "token_classes": 3}, "one of the two")],
)
def test_heads_that_cannot_be_are_refused(fields, message):
    with pytest.raises(MmjaxError, match=message):
        BertConfig(**fields)


# ------------------------------------------------------------------------------------------------------------- network


def test_padding_has_no_effect_and_order_has():
    bert, inputs = model(TINY), batch()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    out = bert.forward(**inputs)
    other = np.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7)
    np.testing.assert_allclose(
        out["pooler_output"], bert.forward(**inputs | {"input_ids": other})["pooler_output"], atol=1e-5
    )
    turned = inputs["input_ids"].copy()
    turned[:, 1:3] = turned[:, [2, 1]]
    assert np.abs(out["pooler_output"] - bert.forward(**inputs | {"input_ids": turned})["pooler_output"]).max() > 1e-2
    without = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    zeros = bert.forward(**inputs | {"token_type_ids": np.zeros_like(inputs["token_type_ids"])})
    np.testing.assert_array_equal(bert.forward(**without)["pooler_output"], zeros["pooler_output"])
    with pytest.raises(MmjaxError, match="20 tokens are longer than positions=19"):
        bert.forward(input_ids=np.ones((1, 20), np.int32))
    with pytest.raises(MmjaxError, match="does not take decoder_input_ids"):
        bert.forward(input_ids=np.ones((1, 2), np.int32), decoder_input_ids=np.ones((1, 2), np.int32))


def test_mlm_logits_at_positions_are_those_of_all_positions():
    bert, examples = model(TINY), batch()
    inputs = [examples[name] for name in ("input_ids", "attention_mask", "token_type_ids", "masked_positions")]
    few: Any = jax.jit(bert.module.apply)(bert.variables, *inputs)
    every: Any = jax.jit(bert.module.apply)(bert.variables, *inputs[:3])
    expected = np.take_along_axis(np.asarray(every["mlm_logits"]), examples["masked_positions"][..., None], 1)
    np.testing.assert_allclose(few["mlm_logits"], expected, atol=1e-5)


def test_dropout_is_where_the_original_has_it():
    """After the embeddings, the attention and the feed-forward, and none after the activation."""
    config = dataclasses.replace(TINY, mlm=False, nsp=False, pooler=False, dropout=0.5, attention_dropout=0.0)
    network, ids, bert = Bert(config), batch()["input_ids"], model(config)

    @jax.jit
    def intermediates(params: Any) -> Any:
        rngs = {"dropout": jax.random.key(1)}
        return network.apply(
            {"params": params}, ids, train=True, rngs=rngs, capture_intermediates=True, mutable=["intermediates"]
        )[1]["intermediates"]

    outputs = intermediates(bert.params)
    block, down = outputs["encoder"]["block_0"], bert.params["encoder"]["block_0"]["mlp"]["down"]
    hidden = np.asarray(jax.nn.gelu(block["mlp"]["up"]["__call__"][0], approximate=False))
    branches = {"attention": block["attention"]["out"]["__call__"][0], "mlp": hidden @ down["kernel"] + down["bias"]}
    np.testing.assert_allclose(block["mlp"]["__call__"][0], branches["mlp"], atol=1e-4)
    for branch, dropped in zip(branches.values(), block["drop"]["__call__"], strict=True):
        np.testing.assert_allclose(dropped, np.where(dropped == 0, 0, 2 * branch), atol=1e-4)
    for dropped in (*block["drop"]["__call__"], np.asarray(outputs["embeddings"]["__call__"][0])):
        assert 0.4 < (dropped == 0).mean() < 0.6


def test_initial_spread_is_tensorflows():
    config = BertConfig(211, 128, 1, 2, 256, 64, mlm=True, nsp=True)
    params = jax.jit(lambda rng: BERT(config).init(rng, batch())[0])(jax.random.key(0))
    for path, leaf in tree.flatten(params).items():
        if leaf.ndim > 1 and leaf.size > 4000:
            # A normal distribution truncated at two deviations has 0.8796 of the standard deviation.
            assert abs(float(jnp.std(leaf)) / (0.02 * 0.8796) - 1) < 0.05 and float(jnp.abs(leaf).max()) <= 0.04, path
        elif leaf.ndim == 1:
            assert set(np.unique(leaf)) == {1.0 if path.endswith("scale") else 0.0}, path


# -------------------------------------------------------------------------------------------------------------- method


def test_the_loss_is_that_of_the_original():
    config = dataclasses.replace(TINY, dropout=0.0, attention_dropout=0.0)
    bert, inputs = model(config), batch()
    method = BERT(config)
    terms, _ = jax.jit(method.loss)(bert.params, EMPTY, inputs, jax.random.key(2), 0)
    out = bert.forward(**{name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    words = np.asarray(jax.nn.log_softmax(out["prediction_logits"]))
    positions, ids, weights = (inputs[f"masked_{name}"] for name in ("positions", "ids", "weights"))
    nll = -words[np.arange(6)[:, None], positions, ids]
    mlm = (nll * weights).sum() / (weights.sum() + 1e-5)
    following = np.asarray(jax.nn.log_softmax(out["seq_relationship_logits"]))
    nsp = -following[np.arange(6), inputs["next_label"]].mean()
    assert 0 < weights.mean() < 1
    values = [terms["mlm_loss"].value, terms["nsp_loss"], loss_value(terms)]
    np.testing.assert_allclose(values, [mlm, nsp, mlm + nsp], rtol=1e-5)
    evaluated = jax.jit(method.judge)(bert.params, None, inputs)
    np.testing.assert_allclose(evaluated["mlm_loss"], nll, rtol=1e-4)
    right = words[np.arange(6)[:, None], positions].argmax(-1) == ids
    np.testing.assert_array_equal(evaluated["mlm_accuracy"], right)


def test_devices_together_have_the_loss_and_gradient_of_one():
    """Masked words are uneven among devices; their mean is over all of them."""
    config = dataclasses.replace(TINY, dropout=0.0, attention_dropout=0.0)
    method, inputs, params = BERT(config), batch(8), model(config).params

    def gradient(part: Any, axis: str | None = None) -> Any:
        def loss(*arguments: Any) -> Any:
            return method.loss(*arguments, jnp.int32(0), axis)

        return batch_gradient(loss, params, EMPTY, part, jax.random.key(4), axis)[:2]

    grads, metrics = jax.jit(gradient)(inputs)
    assert metrics.keys() == {"loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"}
    parts = {name: array.reshape(4, 2, *array.shape[1:]) for name, array in inputs.items()}
    spread, shared = jax.jit(jax.vmap(lambda part: gradient(part, "i"), axis_name="i"))(parts)
    for name, metric in metrics.items():
        np.testing.assert_allclose(shared[name], np.full(4, metric), rtol=1e-5, atol=1e-6)
    for path, leaf in tree.flatten(grads).items():
        limit = 1e-5 * max(float(jnp.abs(leaf).max()), 0.1)
        np.testing.assert_allclose(tree.flatten(spread)[path][0], leaf, atol=limit, err_msg=path)


def test_training_moves_every_leaf_and_learns_a_batch():
    """The first step changes nothing: its rate is 0."""
    method, inputs = BERT(dataclasses.replace(TINY, dropout=0.0, attention_dropout=0.0)), batch()
    optimizer = Optimizer(bert_adamw(warmup_linear(3e-3, 60, 5)), clip_norm=1.0)
    state = jax.jit(lambda rng: create_state(method, optimizer, rng, inputs))(jax.random.key(0))
    before, step = jax.tree.map(np.asarray, state.params), jax.jit(lambda s: train_step(method, optimizer, s, inputs))
    losses = []
    for turn in range(40):
        state, metrics = step(state)
        losses.append(float(metrics["loss"]))
        if turn == 0:
            jax.tree.map(np.testing.assert_array_equal, state.params, before)
    assert losses[-1] < 0.7 * losses[0]
    unseen = {"embeddings/positions", "embeddings/words"}  # rows of no text: only decay and the MLM head change them
    for path, leaf in tree.flatten(state.params).items():
        moved = np.asarray(leaf) != tree.flatten(before)[path]
        assert moved.all() if path not in unseen and not path.endswith("k/bias") else moved.any(), path


def test_what_decays_is_what_the_original_names():
    """optimization.py:60-70 excludes names that contain LayerNorm, layer_norm or bias."""
    params = BertModel.shapes(TINY)["params"]
    decays = tree.flatten(matrices_only(params))
    for entry in HF.table(TINY):
        path = entry.targets[0].removeprefix("params/")
        named = any(word in entry.sources[0] for word in ("LayerNorm", "bias"))
        assert decays[path] != named, path


# --------------------------------------------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return train_wordpiece([*TEXTS, *TEXTS], 53)  # pairs that occur once are not merged


def test_sentence_vectors_are_means_over_tokens_of_unit_length(tokenizer):
    bert = model(TINY, tokenizer=tokenizer)
    vectors = np.asarray(bert.encode_text(TEXTS, batch_size=2, length=9))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    inputs = tokenizer(TEXTS[1], length=9)
    mean = np.asarray(bert.forward(**inputs)["last_hidden_state"])[0].mean(0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(bert.encode_text(inputs["input_ids"])[0], vectors[1], atol=1e-5)


def test_masked_words_come_in_the_order_of_the_masks(tokenizer):
    bert = model(TINY, tokenizer=tokenizer)
    texts = ["the [MASK] hen", "[MASK] hens [MASK]"]
    outputs = bert.fill_mask(texts, top=3)
    assert len(outputs) == 3 and all(len(row) == 3 for row in outputs)
    inputs = tokenizer(texts)
    shares = np.asarray(jax.nn.softmax(bert.forward(**inputs)["prediction_logits"]))
    for row, (text, position) in zip(outputs, zip(*np.nonzero(inputs["input_ids"] == tokenizer.mask))):
        best = np.argsort(-shares[text, position])[:3]
        assert [name for name, _ in row] == [tokenizer.tokenizer.id_to_token(int(id)) for id in best]
        np.testing.assert_allclose([p for _, p in row], shares[text, position, best], rtol=1e-4)
    with pytest.raises(MmjaxError, match=r"text 1 has no \[MASK\]"):
        bert.fill_mask(["a [MASK]", "a hen"])
    with pytest.raises(MmjaxError, match="mlm=False"):
        model(dataclasses.replace(TINY, mlm=False), tokenizer=tokenizer).fill_mask("[MASK]")
    with pytest.raises(MmjaxError, match="without tokenizer"):
        model(TINY).fill_mask("[MASK]")
    with pytest.raises(MmjaxError, match="vocabulary of 53 does not fit the model's of 31"):
        model(dataclasses.replace(TINY, vocab_size=31), tokenizer=tokenizer).fill_mask("[MASK]")


def test_texts_and_pairs_are_classified(tokenizer):
    bert = model(BertConfig(53, 35, 1, 5, 41, 19, classes=3), tokenizer=tokenizer)
    outputs = bert.classify(list(TEXTS), ["red", "green", "blue"], top=2)
    shares = np.asarray(jax.nn.softmax(bert.forward(**tokenizer(TEXTS))["logits"]))
    for row, share in zip(outputs, shares):
        assert row[0][0] == ("red", "green", "blue")[share.argmax()] and len(row) == 2
        np.testing.assert_allclose(row[0][1], share.max(), rtol=1e-4)
    assert bert.classify("a hen", pairs="the sea") != bert.classify("a hen", pairs="the hen")
    with pytest.raises(MmjaxError, match="labels: 2 names for the 3 classes"):
        bert.classify("a", ["x", "y"])


def test_windows_cover_a_context_and_each_piece_is_central_once(tokenizer):
    context = " ".join(TEXTS * 3)
    pieces = tokenizer.pieces([context])[0]
    parts = windows(tokenizer, "the red hen", context, length=17, stride=4)
    options = len(tokenizer.pieces(["the red hen"])[0])
    capacity = 17 - options - 3
    assert len(parts) == -(-(len(pieces) - capacity) // 4) + 1
    visible = {}
    for number, part in enumerate(parts):
        assert len(part.ids) == len(part.types) == len(part.offsets) == len(part.central) <= 17
        inside = [i for i, span in enumerate(part.offsets) if span is not None]
        assert part.ids[inside[0] : inside[-1] + 1] == pieces[4 * number : 4 * number + capacity]
        for i in inside:
            if part.central[i]:
                assert visible.setdefault(part.offsets[i], number) == number
    assert len(visible) == len(pieces)
    for part in parts:
        for id, span in zip(part.ids, part.offsets):
            if span is not None:
                assert context[slice(*span)] == tokenizer.tokenizer.id_to_token(id).removeprefix("##")
    with pytest.raises(MmjaxError, match="a context of 0 pieces"):
        windows(tokenizer, "who", "  ")


def test_best_answers_are_those_of_trying_all():
    rng = np.random.default_rng(7)
    context = "abcdefghijklmnop"
    positions = [None, None, None, *((i, i + 1) for i in range(9)), None]
    central = [position is not None and i % 5 != 0 for i, position in enumerate(positions)]
    parts = [Window([7] * 13, [0] * 13, positions, central)]
    starts, ends = rng.normal(size=(2, 1, 15))
    starts[0, 13:] = ends[0, 13:] = 99  # padding is ignored
    outputs = best_answers(context, parts, starts, ends, n_best=20, longest=4)
    every = {
        context[i : j + 1]: starts[0, i + 3] + ends[0, j + 3]
        for i in range(9)
        for j in range(i, min(i + 4, 9))
        if central[i + 3]
    }
    expected = sorted(every.items(), key=lambda item: -item[1])[:20]
    assert [answer.text for answer in outputs] == [text for text, _ in expected]
    np.testing.assert_allclose([answer.score for answer in outputs], [score for _, score in expected])
    null = float(starts[0, 0] + ends[0, 0])
    for threshold, first in ((null - outputs[0].score - 0.1, ""), (null - outputs[0].score + 0.1, outputs[0].text)):
        assert best_answers(context, parts, starts, ends, 20, 4, threshold)[0].text == first


def test_an_answer_is_extracted_from_any_window(tokenizer):
    """The network's scores depend on the word alone: a word has the same score in every window."""
    config = BertConfig(53, 35, 1, 5, 41, 64, pooler=False, spans=True)
    bert = model(config, tokenizer=tokenizer)
    context = " ".join(TEXTS * 2)
    whole = bert.answer("the red hen", context, top=3)[0]
    assert whole and all(text in context for text, _ in whole) and whole[0][1] > whole[1][1]
    assert len(bert.answer(["a", "the hen"], [context, "a hen"], length=24, stride=5)) == 2
    with pytest.raises(MmjaxError, match="2 questions for 1 contexts"):
        bert.answer(["a", "b"], "a hen")


def test_saved_and_loaded(tmp_path, tokenizer):
    bert = model(TINY, tokenizer=tokenizer)
    hub.save(bert, tmp_path)
    again = mmjax.load(tmp_path)
    assert again.config == TINY and again.fill_mask("the [MASK]") == bert.fill_mask("the [MASK]")
    mmjax.export(bert, tmp_path / "hf", layout="hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    names = sorted(tokenizer.tokenizer.get_vocab(), key=tokenizer.tokenizer.get_vocab().__getitem__)
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(names) + "\n")
    assert mmjax.load(tmp_path / "hf").fill_mask("the [MASK]") == bert.fill_mask("the [MASK]")
