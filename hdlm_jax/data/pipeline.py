"""Batches of windows as pure functions of (seed, step, global row), read by Grain.

Global row r of the training stream is window shuffle(seed, epoch)(r mod n) of epoch r div n, where
the split has n windows; step s holds rows s B .. s B + B - 1 and process p of P holds the p-th
share of them. So a batch never depends on the number of processes, workers or threads, nor on
what was read before, and any step is reached at once.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.errors import require

_READ_THREADS = 2
_READ_AHEAD = 4  # batches


def batches(
    split: Sequence[np.ndarray],
    seed: int,
    global_batch: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """This process's rows of every batch from `start_step` on, without end.

    Args:
      split: the windows, int32 [L] each.
      seed: of the shuffle, >= 0.
      global_batch: B, rows of a step over all processes.
      start_step: the first step, >= 0; reached in O(1).
      process_index, process_count: which share of each batch this process reads.
      num_workers: processes that read ahead; 0 reads ahead in threads.
      rows: the rows of each batch to read, of 0 .. B - 1, in the place of a share.

    Returns:
      An iterator of int32 [B / process_count, L] (or [len(rows), L]); its `close()` stops the reading ahead.

    Raises:
      UserError: a split without a window, or a batch that does not divide among the processes.
    """
    require(start_step >= 0, "start_step", start_step, "a step >= 0")
    import grain

    if rows is None:
        stream = _stream(split, seed, global_batch, process_index, process_count)
    else:
        single = _stream(split, seed, 1, 0, 1)
        stream = grain.MapDataset.source(_RowsOfBatches(single, global_batch, list(rows)))
    stream = stream[start_step:]
    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READ_AHEAD)
    dataset = stream.to_iter_dataset(options)
    if num_workers:
        _parse_absl_flags()
        dataset = dataset.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=num_workers))
    return iter(dataset)


class _RowsOfBatches(Sequence[np.ndarray]):
    """Element s: rows s B + r of a stream of single rows, for each r that is asked for."""

    def __init__(self, stream: Any, global_batch: int, rows: list[int]):
        self._stream, self._global_batch, self._rows = stream, global_batch, rows

    def __len__(self) -> int:
        return sys.maxsize // self._global_batch

    def __getitem__(self, step: int) -> np.ndarray:
        return np.concatenate([self._stream[step * self._global_batch + row] for row in self._rows])


def batch_at(
    split: Sequence[np.ndarray],
    seed: int,
    global_batch: int,
    step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> np.ndarray:
    """The rows that `batches` gives at `step`, int32 [B / process_count, L], read here and now."""
    require(step >= 0, "step", step, "a step >= 0")
    return _stream(split, seed, global_batch, process_index, process_count)[step]


def _stream(split: Sequence[np.ndarray], seed: int, global_batch: int, process_index: int, process_count: int) -> Any:
    """The Grain MapDataset whose element s is this process's share of the batch of step s."""
    import grain

    require(len(split) > 0, "data", "a split without a window", "at least one window")
    require(seed >= 0, "seed", seed, "an integer >= 0")
    require(0 <= process_index < process_count, "process_index", process_index, f"0 .. {process_count - 1}")
    whole = global_batch >= 1 and global_batch % process_count == 0
    require(whole, "batch", global_batch, f"a positive multiple of {process_count}, the number of processes")
    # Grain adds the epoch to the seed, so neighbouring seeds would share epochs without this hash.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    rows = grain.MapDataset.source(split).shuffle(shuffle_seed).repeat(None)
    # Without drop_remainder the endless length is divided in floating point and overflows.
    return rows.batch(global_batch // process_count, drop_remainder=True)[process_index::process_count]


def _parse_absl_flags() -> None:
    """Grain's worker processes read absl flags, which only `app.run` would have parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])


def held_out_batches(
    split: Sequence[np.ndarray], batch: int, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every window of a split once, in order.

    Args:
      split: n windows, int32 [L] each.
      batch: B, rows of a batch over all processes.
      process_index, process_count: which share of each batch this process reads.

    Yields:
      (tokens int32 [B / process_count, L], is_row bool [B / process_count]), ceil(n / B) times on
      every process. Rows beyond the last window are window 0 again, with `is_row` False.

    Raises:
      UserError: a split without a window, or a batch that does not divide among the processes.
    """
    require(len(split) > 0, "data", "a split without a window", "at least one window")
    whole = batch >= 1 and batch % process_count == 0
    require(whole, "batch", batch, f"a positive multiple of {process_count}, the number of processes")
    local = batch // process_count
    return _in_order(split, range(process_index * local, len(split) + process_index * local, batch), local)


def _in_order(split, starts, local):
    for start in starts:
        rows = np.arange(start, start + local)
        is_row = rows < len(split)
        yield np.stack([split[int(i)] for i in np.where(is_row, rows, 0)]), is_row


class TextWindows(NamedTuple):
    """A text cut into windows.

    Attributes:
      tokens: int32 [n, L]; after the end of the text, `end_of_text`.
      valid: bool [n, L], which of them are tokens of the text.
      num_bytes: bytes of the text in UTF-8.
    """

    tokens: np.ndarray
    valid: np.ndarray
    num_bytes: int


def windows_of_text(text: str, tokenizer: Tokenizer, length: int) -> TextWindows:
    """Cuts any text into windows of `length` tokens that hold all of it, for evaluation.

    Only the text's own tokens are counted: no `end_of_text` stands before it.

    Raises:
      UserError: an empty text or a length below 1.
    """
    require(bool(text), "text", text, "a text that is not empty")
    require(length >= 1, "data.length", length, "a number of tokens >= 1")
    ids = tokenizer.encode(text)
    n = -(-len(ids) // length)
    tokens = np.full(n * length, tokenizer.end_of_text, np.int32)
    tokens[: len(ids)] = ids
    valid = np.arange(n * length) < len(ids)
    return TextWindows(tokens.reshape(n, length), valid.reshape(n, length), len(text.encode()))
