"""Batches: pure functions of seed, step and row, whoever reads them; text cut for evaluation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdlm_jax.data import pipeline, prepare, tokenizers
from hdlm_jax.errors import UserError

WINDOWS = np.arange(23 * 4, dtype=np.int32).reshape(23, 4)  # window i begins with 4 i


def first(batch: np.ndarray) -> list[int]:
    """The indices of the windows in a batch."""
    return (batch[:, 0] // 4).tolist()


def rows(seed: int, start: int, stop: int) -> list[int]:
    """The windows of global rows start .. stop-1 of the stream."""
    return [first(pipeline.batch_at(WINDOWS, seed, 1, row))[0] for row in range(start, stop)]


def take(n: int, *args, **kwargs) -> list[np.ndarray]:
    iterator = pipeline.batches(WINDOWS, *args, **kwargs)
    taken = list(itertools.islice(iterator, n))
    iterator.close()
    return taken


def test_batches_are_windows():
    (batch,) = take(1, 0, 6)
    assert (batch.shape, batch.dtype) == ((6, 4), np.int32)
    np.testing.assert_array_equal(batch, WINDOWS[first(batch)])


def test_every_epoch_holds_every_window_once_in_another_order():
    epochs = [rows(3, 23 * e, 23 * (e + 1)) for e in range(6)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert list(range(23)) not in epochs


def test_batches_run_across_epochs():
    stream = [i for batch in take(12, 3, 4) for i in first(batch)]
    assert stream == rows(3, 0, 48)


def test_seeds_share_no_epoch():
    epochs = [tuple(rows(seed, 23 * e, 23 * (e + 1))) for seed in range(4) for e in range(4)]
    assert len(set(epochs)) == 16


def test_the_order_of_the_default_seed_stays():
    """Changes when Grain changes its shuffle: then runs do not resume bit-exactly across the upgrade."""
    assert rows(0, 0, 10) == [18, 8, 16, 7, 20, 13, 1, 0, 19, 17]


@given(st.integers(0, 2**40), st.sampled_from([1, 2, 3, 6]), st.integers(0, 10**9))
def test_any_step_is_the_same_for_every_number_of_processes(seed, count, step):
    whole = pipeline.batch_at(WINDOWS, seed, 6, step)
    parts = [pipeline.batch_at(WINDOWS, seed, 6, step, p, count) for p in range(count)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(st.integers(0, 100), st.integers(0, 100), st.sampled_from([(2, 3), (3, 2), (6, 1), (1, 6)]))
def test_a_row_does_not_depend_on_the_batch_size(seed, step, sizes):
    small, times = sizes
    parts = [pipeline.batch_at(WINDOWS, seed, small, step * times + i) for i in range(times)]
    np.testing.assert_array_equal(np.concatenate(parts), pipeline.batch_at(WINDOWS, seed, 6, step))


@pytest.mark.parametrize("start", [0, 1, 17, 10**9])
@pytest.mark.parametrize("process", [0, 1])
def test_reading_on_from_any_step_is_the_slow_twin(start, process):
    for i, batch in enumerate(take(9, 5, 4, start, process, 2)):
        np.testing.assert_array_equal(batch, pipeline.batch_at(WINDOWS, 5, 4, start + i, process, 2))


def test_seeking_is_immediate():
    read = []

    class Watched:
        def __len__(self):
            return 23

        def __getitem__(self, i):
            read.append(i)
            return WINDOWS[i]

    iterator = pipeline.batches(Watched(), 0, 2, start_step=10**12)
    next(iterator)
    iterator.close()
    assert len(read) <= 2 * (pipeline._READ_AHEAD + 2)


@pytest.fixture
def prepared(tmp_path) -> prepare.Prepared:
    text = "\n\n".join(f"Paragraph {i} of a text." for i in range(60))
    (tmp_path / "x.txt").write_text(text)
    config = {"source": "text", "path": str(tmp_path / "x.txt"), "length": 8, "held_out": 0.2}
    return prepare.prepare(config, tmp_path / "out")


def test_prepared_windows_are_read_in_threads(prepared):
    iterator = pipeline.batches(prepared.train, 1, 8, start_step=3)
    for step, batch in zip(range(3, 40), iterator, strict=False):
        np.testing.assert_array_equal(batch, pipeline.batch_at(prepared.train, 1, 8, step))
    iterator.close()


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_processes_change_nothing(prepared, num_workers):
    iterator = pipeline.batches(prepared.train, 1, 8, start_step=3, num_workers=num_workers)
    for step, batch in zip(range(3, 10), iterator, strict=False):
        np.testing.assert_array_equal(batch, pipeline.batch_at(prepared.train, 1, 8, step))
    iterator.close()


# ---- held-out windows


@pytest.mark.parametrize("batch", [1, 4, 23, 30])
def test_held_out_windows_come_once_in_order(batch):
    seen = list(pipeline.held_out_batches(WINDOWS, batch))
    assert len(seen) == -(-23 // batch)
    assert all(tokens.shape == (batch, 4) and is_row.shape == (batch,) for tokens, is_row in seen)
    kept = np.concatenate([tokens[is_row] for tokens, is_row in seen])
    np.testing.assert_array_equal(kept, WINDOWS)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_held_out_batches_are_shared_among_processes(count):
    shares = [list(pipeline.held_out_batches(WINDOWS, 6, p, count)) for p in range(count)]
    whole = list(pipeline.held_out_batches(WINDOWS, 6))
    for parts, (tokens, is_row) in zip(zip(*shares, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([t for t, _ in parts]), tokens)
        np.testing.assert_array_equal(np.concatenate([r for _, r in parts]), is_row)


# ---- windows of a text


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 20))
def test_windows_of_a_text_hold_all_of_it(text, length):
    tokenizer = tokenizers.build("bytes")
    tokens, valid, num_bytes = pipeline.windows_of_text(text, tokenizer, length)
    assert tokens.shape == valid.shape and tokens.shape[1] == length
    assert (tokens.dtype, valid.dtype) == (np.int32, np.bool_)
    assert tokenizer.decode(tokens[valid]) == text
    assert num_bytes == len(text.encode()) == valid.sum()
    assert (tokens[~valid] == tokenizer.end_of_text).all()
    assert valid[:-1].all() and valid[-1].any()


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"split": WINDOWS[:0]}, "data: got 'a split without a window'"),
        ({"global_batch": 5, "process_count": 2}, "batch: got 5; allowed: a positive multiple of 2"),
        ({"global_batch": 0}, "batch: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"process_index": 2, "process_count": 2}, r"process_index: got 2; allowed: 0 .. 1"),
    ],
)
def test_what_batches_refuse(change, why):
    arguments = {"split": WINDOWS, "seed": 0, "global_batch": 4, **change}
    with pytest.raises(UserError, match=why):
        pipeline.batches(**arguments)
    with pytest.raises(UserError, match=why):
        pipeline.batch_at(**arguments, step=0)


def test_steps_below_zero_are_refused():
    with pytest.raises(UserError, match="start_step: got -1"):
        pipeline.batches(WINDOWS, 0, 4, -1)
    with pytest.raises(UserError, match="step: got -1"):
        pipeline.batch_at(WINDOWS, 0, 4, -1)


def test_what_held_out_batches_and_windows_refuse():
    with pytest.raises(UserError, match="at least one window"):
        pipeline.held_out_batches(WINDOWS[:0], 4)
    with pytest.raises(UserError, match="batch: got 3"):
        pipeline.held_out_batches(WINDOWS, 3, 0, 2)
    with pytest.raises(UserError, match="text: got ''"):
        pipeline.windows_of_text("", tokenizers.build("bytes"), 4)
    with pytest.raises(UserError, match="data.length: got 0"):
        pipeline.windows_of_text("x", tokenizers.build("bytes"), 0)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [2, 3], [0, 3], [1]])
def test_any_rows_of_each_batch_can_be_read(rows):
    for step, batch in enumerate(take(9, 5, 4, 7, rows=rows), 7):
        np.testing.assert_array_equal(batch, pipeline.batch_at(WINDOWS, 5, 4, step)[rows])
