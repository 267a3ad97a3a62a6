"""A mixture of sources: their shares, exact resumption, and every refusal."""

import numpy as np
import pytest

from mmjax.data.decoding import BadRecord
from mmjax.data.mixture import Mixture
from mmjax.data.pipeline import Pipeline, TooManyBadRecords
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError


class Spoilt(ArraySource):
    def __getitem__(self, index):
        if index % 3 == 0:
            raise BadRecord("spoilt")
        return super().__getitem__(index)


def mixture(kind=ArraySource, **options):
    many, few = ArraySource(label=np.arange(101), name="many"), kind(label=np.arange(7) + 1000, name="few")
    return Mixture({"many": Pipeline(many, 6, seed=1), "few": Pipeline(few, 2, seed=2, **options)})


def test_each_step_has_so_many_of_each_and_the_small_source_repeats():
    batches = [batch for _, batch in zip(range(30), mixture())]
    assert all(batch["many_label"].shape == (6,) and batch["few_label"].shape == (2,) for batch in batches)
    few = np.concatenate([batch["few_label"] for batch in batches])
    assert set(few) == set(range(1000, 1007)) and max(np.bincount(few - 1000)) - min(np.bincount(few - 1000)) <= 7
    many = np.concatenate([batch["many_label"] for batch in batches[:16]])
    assert len(set(many)) == len(many) == 96


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_resumes_with_the_next_batch(step):
    whole = iter(mixture())
    for _ in range(step):
        next(whole)
    state, rest = whole.get_state(), [next(whole) for _ in range(9)]
    resumed = iter(mixture())
    resumed.set_state(state)
    for expected in rest:
        batch = next(resumed)
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name], value)
    assert resumed.get_state() == whole.get_state()
    resumed.close()


def test_bad_records():
    batches = iter(mixture(Spoilt, max_bad_fraction=1.0))
    for _ in range(5):
        next(batches)
    assert batches.skipped and all("spoilt" in record and record.startswith("few") for record in batches.skipped)
    strict = iter(mixture(Spoilt, max_bad_fraction=0.0))
    with pytest.raises(TooManyBadRecords):
        for _ in range(5):
            before = strict.get_state()
            next(strict)
    assert strict.get_state() == before


def test_refusals():
    with pytest.raises(MmjaxError, match="pipelines that repeat for ever; epochs is set in none"):
        Mixture({})
    with pytest.raises(MmjaxError, match=r"epochs is set in \['a'\]"):
        Mixture({"a": Pipeline(ArraySource(label=np.arange(4)), 2, epochs=1)})
    with pytest.raises(MmjaxError, match=r"this state is of the sources \['a'\]; there are \['few', 'many'\]"):
        iter(mixture()).set_state({"a": {}})
