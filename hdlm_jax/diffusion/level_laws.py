"""Laws of levels: how the level of a position follows from the generation step.

A law knows the positions 0 .. free-1 that no prompt has given. It offers `num_steps(free)` and
`levels(j, step, free)`, which work alike on ints, numpy arrays and (traced) JAX integers that broadcast.
`Staircase` has its windows in closed form too; those of the others are read off their levels once
(`timeline_of`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.errors import require


def module_of(*values: Any) -> Any:
    """jax.numpy if any value is a (perhaps traced) JAX array, else numpy: one formula serves both."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


class Staircase(NamedTuple):
    """start_j = stride floor(j / block) + floor((j mod block) num / den), one level a call from there."""

    tau_max: int
    block: int  # positions after which the pattern repeats
    stride: int  # calls after which it repeats
    num: int = 0  # num / den, in lowest terms: calls from one start to the next inside a block
    den: int = 1

    def start(self, j: Any) -> Any:
        """The first call that changes position j."""
        return j // self.block * self.stride + j % self.block * self.num // self.den

    def num_steps(self, free: int) -> int:
        """Model calls until the first `free` positions have settled."""
        return self.start(free - 1) + self.tau_max

    def levels(self, j: Any, step: Any, free: int) -> Any:
        """Levels of positions j at a step."""
        return module_of(j, step).clip(self.start(j) + self.tau_max - step, 0, self.tau_max)

    def count(self, calls: Any, size: Any) -> Any:
        """How many of the first `size` positions of a block start within its first `calls` calls."""
        if self.num == 0:
            return size * (calls > 0)
        return module_of(calls, size).clip(-(-calls * self.den // self.num), 0, size)

    def window(self, step: Any, free: int) -> tuple[Any, Any]:
        """(start, stop) of the active ones among the first `free` positions in the call step -> step+1."""
        xp = module_of(step)
        block = xp.maximum(step // self.stride, 0)
        begin = xp.clip(block * self.block, 0, free)
        size = xp.clip(free - begin, 0, self.block)
        calls = step - block * self.stride + 1
        return begin + self.count(calls - self.tau_max, size), begin + self.count(calls, size)


class Line(NamedTuple):
    """At each step a line through position 2 `free` at tau_max, rounded to whole levels."""

    tau_max: int

    def num_steps(self, free: int) -> int:
        """Model calls until the first `free` positions have settled."""
        return free - 1 + self.tau_max

    def levels(self, j: Any, step: Any, free: int) -> Any:
        """Levels of positions j at a step."""
        clip = module_of(j, step).clip
        ahead = clip(self.num_steps(free) - step, 0, self.num_steps(free))
        position = clip(free - 1 - ahead, 0, free)  # the line's moving end
        level = clip(ahead - (free - 1), 0, self.tau_max)
        run = 2 * free - position
        height = self.tau_max * run - (2 * free - j) * (self.tau_max - level)  # of the line at j, times run
        floor, twice = height // run, height % run * 2
        half_to_even = (twice > run) | ((twice == run) & (floor % 2 == 1))
        return clip(floor + half_to_even, 0, self.tau_max)


class Table(NamedTuple):
    """Given levels [T+1, L], kept as bytes: equal tables are equal and hash alike."""

    tau_max: int
    shape: tuple[int, int]
    data: bytes

    @property
    def array(self) -> np.ndarray:
        """int32 [T+1, L]."""
        return np.frombuffer(self.data, np.int32).reshape(self.shape)

    def num_steps(self, free: int) -> int:
        """Model calls until the first `free` positions have settled."""
        if free == self.shape[1]:
            return self.shape[0] - 1
        return int(self.array[:, :free].any(1).sum())

    def levels(self, j: Any, step: Any, free: int) -> Any:
        """Levels of positions j at a step."""
        xp = module_of(j, step)
        step, j = xp.clip(step, 0, self.shape[0] - 1), xp.clip(j, 0, self.shape[1] - 1)
        return xp.asarray(self.array)[step, j]


class Timeline(NamedTuple):
    """What a schedule without closed forms does, read off its levels [T+1, L]."""

    start_L: np.ndarray  # first call that changes a position; -tau_max for a given one
    settle_L: np.ndarray  # first step at level 0; -tau_max for a given one
    windows: np.ndarray  # [T+2, 2] window of the calls from steps -1, 0, .., T


def timeline_of(levels: np.ndarray, tau_max: int) -> Timeline:
    """The timeline of levels [T+1, L]."""
    given_L = levels[0] == 0
    start_L = np.where(given_L, -tau_max, (np.diff(levels, axis=0, append=0) < 0).argmax(0))
    settle_L = np.where(given_L, -tau_max, (levels == 0).argmax(0))
    step_Tx1 = np.arange(-1, len(levels))[:, None]
    unsettled = step_Tx1 < settle_L[None]
    active = unsettled & (start_L[None] <= step_Tx1)
    ends = np.stack([_first(active), levels.shape[1] - _first(active[:, ::-1])], axis=1)
    # an empty window stands before the first position that is not settled
    windows = np.where(active.any(1)[:, None], ends, _first(unsettled)[:, None])
    return Timeline(start_L.astype(np.int32), settle_L.astype(np.int32), windows.astype(np.int32))


def _first(mask: np.ndarray) -> np.ndarray:
    """The first true column of each row, the number of columns where there is none."""
    return np.where(mask.any(1), mask.argmax(1), mask.shape[1])


def integer_table(levels: Any, shape: tuple[int, int] | None = None) -> np.ndarray:
    """`levels` as integers [T+1, L], broadcast to `shape` where there is one; else `UserError`."""
    allowed = f"integers {list(shape) if shape else '[T+1, L]'}"
    try:
        table = np.asarray(levels)
        table = table if shape is None else np.broadcast_to(table, shape)
    except ValueError as error:
        require(False, "hyperschedule.levels", str(error), allowed)
    is_table = np.issubdtype(table.dtype, np.integer) and table.ndim == 2 and table.size > 0
    require(is_table, "hyperschedule.levels", f"{table.dtype}{list(table.shape)}", allowed)
    return table


def check_levels(levels: np.ndarray, tau_max: int) -> None:
    """Refuses levels [T+1, L] that are no hyperschedule's: `UserError` with the reason and the place."""
    start = levels[:1]
    last = np.arange(len(levels))[:, None] == len(levels) - 1
    broken = {
        "levels that start at tau_max (or at 0, for a given position)": (start != 0) & (start != tau_max),
        "levels that never rise": levels > np.concatenate([start, levels[:-1]]),
        "levels that end at 0": last & (levels != 0),
    }
    for allowed, at in broken.items():
        for step, position in np.argwhere(at)[:1]:
            before = f" after {levels[step - 1, position]}" if step else f", tau_max {tau_max}"
            given = f"level {levels[step, position]}{before} at step {step}, position {position}"
            require(False, "hyperschedule.levels", given, allowed)
