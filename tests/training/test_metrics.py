"""The metrics log: valid JSON whatever is written, resumed without what came after, read after a kill."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.training import metrics


def write(folder, *steps):
    log = metrics.MetricsLog(folder)
    for step in steps:
        log.write(step, {"train/loss": step / 10})
    log.close()
    return folder / metrics.FILE


def scalars(path):
    """(step, tag, value) of a TensorBoard event file, and the steps from which earlier files are hidden."""
    from tensorboardX.proto.event_pb2 import Event

    data, found, purged, at = path.read_bytes(), [], [], 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        purged += [event.step] if event.session_log.status else []
        at += size + 16
    return found, purged


def test_records_are_lines_of_sorted_json_in_the_file_at_once(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(jnp.int32(3), {"b": np.float32(0.5), "a": jnp.float32(2.0), "n": np.int64(7), "text": "x", "on": True})
    assert (tmp_path / metrics.FILE).read_text() == '{"a": 2.0, "b": 0.5, "n": 7, "on": true, "step": 3, "text": "x"}\n'
    log.close()
    assert metrics.read(tmp_path) == [{"a": 2.0, "b": 0.5, "n": 7, "on": True, "step": 3, "text": "x"}]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(1, {"a": float("nan"), "b": np.float32("inf"), "c": jnp.float32("-inf"), "d": None})
    log.close()
    text = (tmp_path / metrics.FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": None, "d": None}


def test_the_same_numbers_are_tensorboard_events(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(1, {"loss": 0.5, "bad": float("nan"), "text": "x"})
    log.write(2, {"loss": 0.25})
    log.close()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert scalars(events) == ([(1, "loss", 0.5), (2, "loss", 0.25)], [])


def test_resume_drops_what_came_after_the_restored_step(tmp_path):
    path = write(tmp_path, 1, 2, 3, 4)
    log = metrics.MetricsLog(tmp_path)
    log.resume(2)
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2]
    log.write(3, {"train/loss": 9.0})
    log.close()
    (tmp_path / "straight").mkdir()
    straight = write(tmp_path / "straight", 1, 2)
    assert path.read_text() == straight.read_text() + '{"step": 3, "train/loss": 9.0}\n'
    assert any(scalars(events)[1] == [3] for events in tmp_path.glob("events.out.tfevents.*"))
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_resume_of_nothing_starts_an_empty_log(tmp_path):
    metrics.MetricsLog(tmp_path).resume(0)
    assert metrics.read(tmp_path) == metrics.read(tmp_path / "none") == []


@pytest.mark.parametrize("tail", ['{"step": 3, "tra', '{"step"', "\u00e4".encode()[:1], "[1]", "7"])
def test_a_line_torn_by_a_kill_is_left_out(tmp_path, tail):
    path = write(tmp_path, 1, 2)
    with open(path, "ab") as file:
        file.write(tail if isinstance(tail, bytes) else tail.encode())
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2]
    write(tmp_path, 3)  # appended without a resume: the torn line stays alone
    assert [record["step"] for record in metrics.read(tmp_path)] == [1, 2, 3]
    log = metrics.MetricsLog(tmp_path)
    log.resume(3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_texts_with_line_separators_stay_one_record(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write(1, {"text": "a\u2028b\nc"})
    log.close()
    assert metrics.read(tmp_path) == [{"step": 1, "text": "a\u2028b\nc"}]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        metrics.MetricsLog(tmp_path / "file").write(1, {"loss": 1.0})
    with pytest.raises(UserError, match="cannot be written"):
        metrics.MetricsLog(tmp_path / "file").resume(0)
