"""Order, resume, sharding and bad records of the pipeline."""

import gc
import json
import multiprocessing
import os
import signal
import time
from multiprocessing import synchronize

import grain
import numpy as np
import pytest

from mmjax.data.decoding import BadRecord
from mmjax.data.pipeline import Pipeline, TooManyBadRecords, batches
from mmjax.data.sources import ArraySource
from mmjax.errors import MmjaxError

N, B = 37, 5  # seven batches an epoch, two records left over


class Noise(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return element | {"noise": rng.standard_normal(3).astype(np.float32), "name": "not batched"}


class Faulty(grain.transforms.Map):
    def __init__(self, bad):
        self.bad = bad

    def map(self, element):
        if element["label"] in self.bad:
            raise BadRecord(self.bad[element["label"]])
        return element


def source(n=N):
    return ArraySource(
        image=np.arange(n * 12, dtype=np.uint16).astype(np.uint8).reshape(n, 2, 2, 3), label=np.arange(n)
    )


def pipeline(**fields):
    return Pipeline(**({"source": source(), "batch_size": B, "seed": 3, "transforms": (Noise(),)} | fields))


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert list(one) == list(other) == ["image", "index", "label", "noise"]
        for key in one:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


@pytest.fixture(scope="module")
def straight():
    """17 batches, two and a half epochs, from one process without workers."""
    return take(iter(pipeline()), 17)


def test_an_epoch_is_a_permutation_and_batches_are_typed(straight):
    for epoch in (straight[:7], straight[7:14]):
        assert len(np.unique(np.concatenate([batch["index"] for batch in epoch]))) == 35
    assert not np.array_equal(straight[0]["index"], straight[7]["index"])
    batch = straight[0]
    assert batch["index"].dtype == np.int64 and batch["image"].shape == (B, 2, 2, 3)
    np.testing.assert_array_equal(batch["label"], batch["index"])
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"] * 12 % 256)


def test_the_order_is_that_of_every_version(straight):
    assert straight[0]["index"].tolist() == [19, 3, 14, 35, 31]
    assert straight[9]["index"].tolist() == [32, 11, 35, 36, 34]


def test_other_seeds_give_other_orders_and_noise():
    indices = {tuple(np.concatenate([b["index"] for b in take(iter(pipeline(seed=s)), 14)])) for s in range(5)}
    assert len(indices) == 5
    epochs = {run[i : i + 35] for run in indices for i in (0, 35)}
    assert len(epochs) == 10  # epoch 1 of a seed is not epoch 0 of the next


def test_state_at_every_step_restores_the_rest(straight):
    iterator, states = iter(pipeline()), []
    for _ in range(17):
        states.append(json.loads(json.dumps(iterator.get_state())))
        next(iterator)
    for step, state in enumerate(states):
        fresh = iter(pipeline())
        fresh.set_state(state)
        assert_same(take(fresh, 17 - step), straight[step:])
    iterator.set_state(states[4])  # backwards, in the same iterator
    assert_same(take(iterator, 3), straight[4:7])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, straight):
    iterator = iter(pipeline(workers=workers))
    assert_same(take(iterator, 6), straight[:6])
    state = iterator.get_state()
    assert_same(take(iterator, 11), straight[6:])
    iterator.set_state(state)
    assert_same(take(iterator, 3), straight[6:9])
    iterator.close()
    alone = iter(pipeline())
    alone.set_state(state)
    assert_same(take(alone, 11), straight[6:])
    assert alone.get_state() == {**state, "step": 17}


def test_a_killed_worker_is_replaced_and_the_order_continues(straight):
    iterator = iter(pipeline(workers=2, prefetch=1))
    actual = take(iterator, 2)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
        break
    began = time.monotonic()
    actual += take(iterator, 8)
    assert time.monotonic() - began < 30
    iterator.close()
    assert_same(actual, straight[:10])
    assert not multiprocessing.active_children()


def test_a_killed_workers_semaphores_do_not_wait_for_the_garbage_collector():
    def count() -> int:
        # By type: isinstance reads __class__, which makes some of torch's objects warn.
        return sum(issubclass(type(thing), synchronize.SemLock) for thing in gc.get_objects())

    iterator = iter(pipeline(workers=2, prefetch=1))
    gc.collect()
    gc.disable()
    try:
        next(iterator)
        running = count()
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        take(iterator, 8)
        assert count() == running > 2
    finally:
        gc.enable()
        iterator.close()


def test_workers_end_with_their_iterator():
    iterator = iter(pipeline(workers=2))
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    del iterator
    gc.collect()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("bad", [{}, {3: "caption: empty", 17: "image: truncated", 18: "image: truncated"}])
def test_the_slices_of_processes_make_the_global_batch(bad):
    fields = {"batch_size": 6, "transforms": (Noise(), Faulty(bad)), "max_bad_fraction": 0.5}
    whole = take(iter(pipeline(**fields)), 14)
    parts = [take(iter(pipeline(**fields, process_index=p, process_count=3)), 14) for p in range(3)]
    assert all(part[0]["index"].shape == (2,) for part in parts)
    assert_same([{k: np.concatenate([p[i][k] for p in parts]) for k in whole[0]} for i in range(14)], whole)


def test_the_last_batch_of_an_evaluation_is_shorter():
    once = pipeline(shuffle=False, drop_remainder=False, epochs=1, transforms=(Noise(),))
    assert len(once) == 8
    indices = [batch["index"] for batch in batches(once)]
    assert np.concatenate(indices).tolist() == list(range(N)) and len(indices[-1]) == 2
    assert len(pipeline(epochs=3)) == 21 == len(list(batches(pipeline(epochs=3))))


BAD = {2: "image: empty", 5: "image: truncated", 6: "image: truncated", 30: "caption: empty"}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_replaced_counted_once_and_named(tmp_path, straight, workers):
    file = tmp_path / "log" / "quarantine.jsonl"
    fields = {"transforms": (Noise(), Faulty(BAD)), "max_bad_fraction": 0.2, "workers": workers, "quarantine": file}
    iterator = iter(pipeline(**fields))
    actual = take(iterator, 17)
    order = np.stack([batch["index"] for batch in straight])
    got = np.stack([batch["index"] for batch in actual])
    good = ~np.isin(order, list(BAD))
    np.testing.assert_array_equal(got[good], order[good])  # the others keep their positions
    assert not np.isin(got, list(BAD)).any() and (~good).sum() >= 8
    replaced = [(i, j) for i, j in np.argwhere(~good[:6]) if good[i + 1, j]]
    assert replaced and all(got[i, j] == order[i + 1, j] for i, j in replaced)  # the same position, one batch later
    assert iterator.bad_counts == {"caption: empty": 1, "image: empty": 1, "image: truncated": 2}
    iterator.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == sorted(BAD)
    assert {line["name"]: line["reason"] for line in lines} == {f"arrays[{i}]": why for i, why in BAD.items()}


def test_counts_survive_resume_and_the_log_is_not_doubled(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    fields = {"transforms": (Noise(), Faulty(BAD)), "max_bad_fraction": 0.2, "quarantine": file}
    iterator = iter(pipeline(**fields))
    states = [iterator.get_state()]
    for _ in range(9):
        next(iterator)
        states.append(json.loads(json.dumps(iterator.get_state())))
    text = file.read_text()
    assert text.count("\n") == 4
    file.write_text(text[:-7])  # a kill cut the last line
    resumed = iter(pipeline(**fields))
    resumed.set_state(states[3])
    assert resumed.bad_counts == {reason: len(records) for reason, records in states[3]["bad"].items()}
    take(resumed, 6)
    assert resumed.get_state() == states[9]
    assert sorted(map(str, map(json.loads, file.read_text().splitlines()))) == sorted(
        map(str, map(json.loads, text.splitlines()))
    )


def test_too_many_bad_records_stop_the_run_and_leave_the_state_before(tmp_path):
    file = tmp_path / "q.jsonl"
    iterator = iter(pipeline(transforms=(Noise(), Faulty(BAD)), max_bad_fraction=3 / N, quarantine=file))
    taken = 0
    with pytest.raises(TooManyBadRecords, match=r"arrays: 4 bad records by step \d+ \(1 caption: empty.*q\.jsonl"):
        for _ in range(17):
            next(iterator)
            taken += 1
    assert iterator.get_state()["step"] == taken < 7
    more = iter(pipeline(transforms=(Noise(), Faulty(BAD)), max_bad_fraction=0.2))
    more.set_state(iterator.get_state())
    next(more)


def test_a_source_with_nothing_good_stops_without_reading_it_all():
    reads = []

    def broken(record):
        reads.append(record["label"])
        raise BadRecord("file: missing")

    iterator = iter(pipeline(source=source(1000), transforms=(broken,), max_bad_fraction=0.01))
    with pytest.raises(TooManyBadRecords):
        next(iterator)
    assert len(set(reads[:11])) == len(reads[:11]) and len(reads) <= 3 * 11  # prefetched batches stop as early
    with pytest.raises(TooManyBadRecords):
        next(iter(pipeline(transforms=(broken,), max_bad_fraction=1.0)))


def test_the_state_of_another_order_is_refused():
    state = iter(pipeline()).get_state()
    for other, word in (
        (pipeline(seed=4), "seed was 3, is 4"),
        (pipeline(source=source(38)), "source was"),
        (pipeline(batch_size=6), "batch_size was 5, is 6"),
        (pipeline(shuffle=False), "shuffle was True"),
    ):
        with pytest.raises(MmjaxError, match=word):
            iter(other).set_state(state)


def test_batches_that_cannot_be_cut_or_stacked_are_refused():
    with pytest.raises(MmjaxError, match="37 records do not fill a batch of 64"):
        pipeline(batch_size=64)
    with pytest.raises(MmjaxError, match="cannot be cut for process 1 of 2"):
        pipeline(process_index=1, process_count=2)
    with pytest.raises(MmjaxError, match="several processes"):
        pipeline(batch_size=6, drop_remainder=False, process_count=2)

    def ragged(record):
        return record | {"image": record["image"][: 1 + (record["label"] != 4)]}

    with pytest.raises(MmjaxError, match=r"arrays\[4\] gives uint8 \[1, 2, 3\], others uint8 \[2, 2, 3\]"):
        list(batches(pipeline(transforms=(ragged,), shuffle=False, epochs=1)))


GROUPS = np.array([0, 1, 2] * 12 + [1])


def test_batches_of_one_group():
    """Each group is permuted and cut by itself; what does not fill a batch is left to later epochs."""
    grouped = pipeline(groups=GROUPS)
    assert grouped.steps_per_epoch == sum(count // B for count in np.bincount(GROUPS)) == 6
    iterator = iter(grouped)
    epochs = [take(iterator, 6) for _ in range(2)]
    for epoch in epochs:
        labels = [batch["label"] for batch in epoch]
        assert [len(set(GROUPS[each])) for each in labels] == [1] * 6
        assert len(set(np.concatenate(labels).tolist())) == 6 * B
    assert [set(batch["label"]) for batch in epochs[0]] != [set(batch["label"]) for batch in epochs[1]]
    assert_same(take(iter(grouped.replace(workers=2)), 8), (epochs[0] + epochs[1])[:8])


def test_groups_resume_and_are_part_of_the_order():
    grouped = pipeline(groups=GROUPS)
    iterator = iter(grouped)
    take(iterator, 4)
    state, expected = json.loads(json.dumps(iterator.get_state())), take(iterator, 5)
    again = iter(grouped)
    again.set_state(state)
    assert_same(take(again, 5), expected)
    with pytest.raises(MmjaxError, match="another order of records: groups"):
        iter(pipeline(groups=GROUPS[::-1].copy())).set_state(state)
    with pytest.raises(MmjaxError, match="groups: one for each of 37 records"):
        pipeline(groups=GROUPS[1:])


def test_a_bad_record_is_replaced_within_its_group():
    bad = {4: "caption: empty"}
    grouped = pipeline(groups=GROUPS, transforms=(Noise(), Faulty(bad)), max_bad_fraction=0.1)
    batches_of_epoch = take(iter(grouped), 6)
    assert all(len(set(GROUPS[batch["label"]])) == 1 and 4 not in batch["label"] for batch in batches_of_epoch)
