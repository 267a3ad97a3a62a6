"""The key-table engine: every op has an inverse, and every mismatch is listed."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

from mmjax.tree import flatten
from mmjax.weights.table import (
    Entry,
    Layout,
    WeightsError,
    chain,
    conv,
    int64,
    join,
    linear,
    load_table,
    reshape,
    same,
    save_table,
    split,
    stack,
    transpose,
    unstack,
)

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def target(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.empty(shape, dtype)


TABLE = (
    Entry("scale", "params/norm/scale"),
    Entry("fc.weight", "params/head/kernel", linear),
    Entry("conv.weight", "params/stem/kernel", conv),
    Entry("patch.weight", "params/patch/kernel", chain(conv, reshape((2, 3, 5, 7), (30, 7)))),
    Entry("query", "params/query/kernel", reshape((7, 2, 3))),
    Entry("qkv", ("params/q", "params/k", "params/v"), chain(split(3), linear)),
    Entry(("a", "b"), "params/ab", join(2, axis=1)),
    Entry(("c", "d", "e"), "params/cde", stack(3, axis=1)),
    Entry("blocks", ("params/0/bias", "params/1/bias"), unstack(2)),
    Entry("map", "params/map", transpose((2, 0, 1))),
    Entry("count", "stats/norm/count", int64, optional=True, default=0),
)


def arrays() -> dict[str, np.ndarray]:
    return {
        "scale": normal(5),
        "fc.weight": normal(11, 7),
        "conv.weight": normal(7, 2, 3, 5),
        "patch.weight": normal(7, 5, 2, 3),
        "query": normal(7, 2, 3),
        "qkv": normal(15, 7),
        "a": normal(3, 2),
        "b": normal(3, 2),
        "c": normal(3),
        "d": normal(3),
        "e": normal(3),
        "blocks": normal(2, 5),
        "map": normal(2, 3, 5),
        "count": np.array(12345, np.int64),
    }


def shapes() -> dict:
    return {
        "params": {
            "norm": {"scale": target(5)},
            "head": {"kernel": target(7, 11)},
            "stem": {"kernel": target(3, 5, 2, 7)},
            "patch": {"kernel": target(30, 7)},
            "query": {"kernel": target(7, 6)},
            "q": target(7, 5),
            "k": target(7, 5),
            "v": target(7, 5),
            "ab": target(3, 4),
            "cde": target(3, 3),
            "0": {"bias": target(5)},
            "1": {"bias": target(5)},
            "map": target(5, 2, 3),
        },
        "stats": {"norm": {"count": target(dtype=np.int32)}},
    }


def test_a_round_trip_is_bit_exact_in_both_directions():
    public = arrays()
    loaded = load_table(TABLE, public, shapes(), "x.safetensors")
    assert flatten(loaded).keys() == flatten(shapes()).keys()
    assert flatten(loaded)["stats/norm/count"].dtype == np.int32
    back = save_table(TABLE, loaded)
    assert list(back) == [key for entry in TABLE for key in entry.sources]
    for key, array in public.items():
        assert back[key].dtype == array.dtype and back[key].flags.c_contiguous, key
        np.testing.assert_array_equal(back[key], array)
    again = load_table(TABLE, back, shapes(), "x.safetensors")
    for path, leaf in flatten(loaded).items():
        np.testing.assert_array_equal(flatten(again)[path], leaf)


def test_ops_put_numbers_where_the_original_has_them():
    x = normal(5, 7)
    public = arrays()
    loaded = flatten(load_table(TABLE, public, shapes(), "f"))
    np.testing.assert_allclose(x @ loaded["params/head/kernel"], x @ public["fc.weight"].T)
    np.testing.assert_array_equal(loaded["params/k"], public["qkv"][5:10].T)
    assert loaded["params/stem/kernel"][2, 4, 1, 6] == public["conv.weight"][6, 1, 2, 4]
    np.testing.assert_array_equal(loaded["params/cde"][:, 1], public["d"])
    np.testing.assert_array_equal(loaded["params/1/bias"], public["blocks"][1])


def test_an_optional_key_takes_its_default():
    public = arrays()
    del public["count"]
    assert flatten(load_table(TABLE, public, shapes(), "f"))["stats/norm/count"] == 0


def test_an_optional_key_without_default_is_missing_only_where_the_module_wants_it():
    table = (Entry("w", "params/w"), Entry("bias", "params/bias", optional=True))
    public = {"w": normal(3)}
    assert list(flatten(load_table(table, public, {"params": {"w": target(3)}}, "f"))) == ["params/w"]
    with pytest.raises(WeightsError, match=r"missing \(1\):\n    bias"):
        load_table(table, public, {"params": {"w": target(3), "bias": target(3)}}, "f")
    assert list(save_table(table, {"params": {"w": normal(3)}})) == ["w"]


def test_half_floats_are_widened_exactly():
    table = (Entry("w", "params/w", linear),)
    half = normal(3, 5).astype(bfloat16)
    loaded = load_table(table, {"w": half}, {"params": {"w": target(5, 3)}}, "f")["params"]["w"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, half.astype(np.float32).T)


def test_one_error_lists_every_misfit():
    public = arrays()
    del public["qkv"], public["b"]
    public |= {"extra.one": normal(1), "extra.two": normal(1), "fc.weight": normal(7, 11), "query": normal(2, 21)}
    expected = shapes()
    expected["params"]["lonely"] = target(2)
    with pytest.raises(WeightsError) as caught:
        load_table((*TABLE, Entry("scale", "params/nowhere")), public, expected, "dir/model.safetensors")
    message = str(caught.value)
    assert message.startswith("dir/model.safetensors does not fit the model:")
    for piece in (
        "missing (2):\n    qkv\n    b\n",
        "unexpected (2):\n    extra.one\n    extra.two\n",
        "misshapen (2):",
        "fc.weight [7, 11]: gives [11, 7], params/head/kernel has [7, 11]",
        "query [2, 21]: reshape((7, 2, 3)) fails: shape (2, 21), expected (7, 2, 3)",
        "parameters that the table does not fill (1):\n    params/lonely",
        "targets that the module does not have (1):\n    params/nowhere",
        "named twice in the table (1):\n    scale",
    ):
        assert piece in message, piece


@pytest.mark.parametrize(
    "key, array, message",
    [
        ("count", np.array(2**31, np.int64), "does not fit int32"),
        ("scale", np.arange(5), "scale [5]: is int64, params/norm/scale has float32"),
        ("qkv", np.zeros((16, 7), np.float32), "qkv [16, 7]: chain(split(3, 0), linear) fails"),
        ("blocks", np.zeros((3, 5), np.float32), "axis 0 of (3, 5) should be 2 long"),
    ],
)
def test_an_array_that_an_op_cannot_take_is_named(key, array, message):
    with pytest.raises(WeightsError) as caught:
        load_table(TABLE, arrays() | {key: array}, shapes(), "f")
    assert message in str(caught.value)


def test_saving_refuses_leaves_without_a_line_and_lines_without_a_leaf():
    loaded = load_table(TABLE, arrays(), shapes(), "f")
    loaded["params"]["stray"] = normal(2)
    del loaded["params"]["head"]
    with pytest.raises(WeightsError) as caught:
        save_table(TABLE, loaded)
    assert "missing (1):\n    params/head/kernel" in str(caught.value)
    assert "unexpected (1):\n    params/stray" in str(caught.value)


def test_ignored_keys_are_dropped_by_glob():
    table = (Entry("w", "params/w"),)
    public = {"w": normal(3), "text.position_ids": np.arange(3)}
    loaded = load_table(table, public, {"params": {"w": target(3)}}, "f", ignored=("*.position_ids",))
    np.testing.assert_array_equal(loaded["params"]["w"], public["w"])


def layout(**fields) -> Layout:
    return Layout("x", lambda keys, json: True, lambda shapes, json: None, lambda config: (), **fields)


def test_unwrap_enters_the_wrapper_strips_prefixes_renames_and_drops():
    keys = [
        "state_dict/module.vit.norm.gamma",
        "state_dict/module.head.weight",
        "state_dict/module.ids",
        "optimizer/lr",
    ]
    names = layout(
        strip=("module.", "vit."), renames=((r"gamma$", "weight"), (r"^(?=norm)", "encoder.")), ignored=("ids",)
    ).unwrap(keys)
    assert names == {
        "encoder.norm.weight": "state_dict/module.vit.norm.gamma",
        "head.weight": "state_dict/module.head.weight",
    }


def test_unwrap_refuses_two_keys_of_one_name():
    with pytest.raises(WeightsError, match=r"f\.pt: w and module\.w both stand for w"):
        layout().unwrap(["w", "module.w"], "f.pt")


def test_only_the_last_reshape_of_a_chain_may_leave_its_shape_out():
    with pytest.raises(ValueError, match="only the last reshape"):
        chain(reshape((2, 3)), same)


def test_copies_are_read_once_and_must_be_equal():
    table = (Entry("words", "params/words", linear, copies=("decoder", "head")), Entry("bias", "params/bias"))
    shapes = {"params": {"words": target(3, 5), "bias": target(7)}}
    words, bias = normal(5, 3), normal(7)
    for names in (("words",), ("decoder",), ("words", "head"), ("head", "words", "decoder")):
        loaded = load_table(table, {"bias": bias} | dict.fromkeys(names, words), shapes, "f")
        np.testing.assert_array_equal(loaded["params"]["words"], words.T)
    assert save_table(table, loaded).keys() == {"words", "bias"}
    with pytest.raises(WeightsError, match=r"under two names \(1\):\n    head differs from words"):
        load_table(table, {"bias": bias, "words": words, "decoder": words, "head": words + 1}, shapes, "f")
    with pytest.raises(WeightsError, match=r"missing \(1\):\n    words"):
        load_table(table, {"bias": bias}, shapes, "f")
