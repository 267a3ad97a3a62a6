"""Features of arrays and pipelines: every row once, in order, compiled once, for any number of rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.data.decoding import BadRecord
from mmjax.data.pipeline import Pipeline
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError
from mmjax.evaluation.features import Extractor
from mmjax.nn.norm import l2_normalize


def counting(calls):
    def encode(params, state, inputs):
        calls.append(inputs.shape)
        return inputs.astype(jnp.bfloat16) * params["scale"]

    return encode


@pytest.mark.parametrize("n", [3, 7, 14, 23])
def test_every_item_once_and_in_order(n):
    calls: list = []
    extract = Extractor(counting(calls), batch_size=7)
    inputs = np.arange(n * 2, dtype=np.uint8).reshape(n, 2)
    for scale in (1, 2):
        features = extract({"scale": jnp.bfloat16(scale)}, None, inputs)
        assert features.dtype == np.float32
        np.testing.assert_array_equal(features, inputs.astype(np.float32) * scale)
    assert calls == [(min(7, n), 2)]  # traced once, for both parameters
    np.testing.assert_array_equal(extract({"scale": jnp.bfloat16(1)}, None, jnp.asarray(inputs)), inputs)


def test_columns_travel_together():
    extract = Extractor(lambda params, state, inputs: inputs["ids"] + inputs["mask"][:, None] * state, batch_size=5)
    ids, mask = np.arange(26).reshape(13, 2), np.arange(13) % 2
    features = extract({}, np.int32(100), {"ids": ids, "mask": mask})
    np.testing.assert_array_equal(features, ids + 100 * mask[:, None])


class Damaged(ArraySource):
    def __getitem__(self, index):
        if index in (2, 12):
            raise BadRecord("image: truncated", self.record_name(index))
        return super().__getitem__(index)


@pytest.mark.parametrize("source", [ArraySource, Damaged])
def test_of_a_pipeline(source):
    images = np.random.default_rng(0).integers(0, 255, (17, 5), np.uint8)
    made = source(image=images, label=np.arange(17) * 3)
    calls: list = []
    extract = Extractor(counting(calls), batch_size=7)
    pipeline = Pipeline(made, batch_size=4, shuffle=True, max_bad_fraction=0.5)
    features, columns = extract.from_pipeline({"scale": 1}, None, pipeline)
    readable = np.setdiff1d(np.arange(17), [2, 12] if source is Damaged else [])
    np.testing.assert_array_equal(columns["index"], readable)
    np.testing.assert_array_equal(columns["label"], readable * 3)
    np.testing.assert_array_equal(features, images[readable])
    assert sorted(columns) == ["index", "label"] and calls == [(7, 5)]
    two_columns = Extractor(lambda params, state, batch: batch["image"] + batch["label"][:, None], batch_size=7)
    features, _ = two_columns.from_pipeline({}, None, pipeline, key=("image", "label"))
    np.testing.assert_array_equal(features, images[readable].astype(np.float32) + 3 * readable[:, None])


def test_bad_input_is_named():
    extract = Extractor(lambda params, state, inputs: params / inputs)
    with pytest.raises(MmjaxError, match="holiday: 2 of 6 features are not finite"):
        extract(np.float32(1), None, np.array([[1, 0, 2], [3, 0, 4]], np.float32), "holiday")
    with pytest.raises(MmjaxError, match="inputs: need arrays of one length above 0"):
        extract(np.float32(1), None, {"a": np.ones((3, 2)), "b": np.ones((5, 2))})
    with pytest.raises(MmjaxError, match="inputs: need arrays"):
        extract(np.float32(1), None, np.ones((0, 2)))
    pipeline = Pipeline(ArraySource(image=np.ones((5, 2))), batch_size=5)
    with pytest.raises(MmjaxError, match="use from_pipeline"):
        extract(np.float32(1), None, pipeline)
    with pytest.raises(MmjaxError, match=r"no columns \['pixels'\], only \['image', 'index'\]"):
        extract.from_pipeline(np.float32(1), None, pipeline, key="pixels")


def test_unit_rows_and_zero():
    np.testing.assert_allclose(l2_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]], atol=1e-6)
