"""metrics.jsonl: when it is written, on a disk and on an object store, and how a rerun treats it."""

import pytest
from etils import epath

from mmjax.training import metrics
from mmjax.training.metrics import METRICS, MetricsWriter, read_metrics


@pytest.fixture
def writes(monkeypatch):
    """The lengths of metrics.jsonl at each write of the whole file, on what stands for an object store."""
    lengths, kind = [], type(epath.Path("."))
    write_bytes = kind.write_bytes

    def counted(path, data):
        if path.name == METRICS:
            lengths.append(len(data.splitlines()))
        return write_bytes(path, data)

    monkeypatch.setattr(kind, "write_bytes", counted)
    monkeypatch.setattr(metrics, "is_local", lambda path: False)
    return lengths


def test_an_object_store_gets_the_file_at_a_flush_and_not_at_each_line(writes, tmp_path, monkeypatch):
    clock = iter(float(second) for second in range(10_000))
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in range(1, 301):
        writer.write(step, {"train/loss": 1 / step})
    assert 2 <= len(writes) <= 300 / metrics.UPLOAD_SECONDS + 1
    writer.flush()
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 301))
    count = len(writes)
    writer.flush()
    assert len(writes) == count
    writer.write(301, {"train/loss": 0.0})
    writer.close()
    assert read_metrics(tmp_path)[-1] == {"step": 301, "train/loss": 0.0}


@pytest.mark.parametrize("local", [True, False])
def test_a_rerun_has_one_evaluation_a_step(local, tmp_path, request):
    if not local:
        request.getfixturevalue("writes")
    for norm in (3.0, 4.0):
        writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=20)
        if norm == 3:
            writer.write(10, {"train/loss": 2.0})
            writer.write(20, {"train/loss": 1.0})
        writer.write(20, {"val/norm": norm, "val/recall": 0.5})
        writer.write(20, {"val/other": 7})
        writer.close()
    assert read_metrics(tmp_path) == [
        {"step": 10, "train/loss": 2.0},
        {"step": 20, "train/loss": 1.0},
        {"step": 20, "val/norm": 4.0, "val/recall": 0.5},
        {"step": 20, "val/other": 7.0},
    ]
