"""From a sketch to a hyperschedule: a few anchor points, or a drawing of which call works on which position.

A sketch that is no hyperschedule is never repaired: `UserError` names the rule that is broken, and the place.
Rules of every sketch:

  every position settles             and is worked on by one call at least
  levels never rise                  a position settles after it starts
  no call is idle                    each call lowers some level, or it would be paid for nothing

and of those for a `prefix` model, whose rows see what is settled before them and their own window:

  left to right                      no position starts, or settles, before one to its left

>>> print(from_sketch([(0, 0), (7, 3)], length=8, tau_max=4))
from_levels: L=8, width 8, rate 2, tau_max 4, T=7 calls, 4 window rows per token
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from hdlm_jax.diffusion.fields import whole
from hdlm_jax.diffusion.hyperschedules import Hyperschedule, from_levels
from hdlm_jax.errors import one_of, require

WORKED, IDLE = "#", "."


def from_sketch(
    points: Iterable[Sequence[int]], length: int, tau_max: int | None = None, visibility: str = "full"
) -> Hyperschedule:
    """A hyperschedule through anchor points.

    A position starts at call `start`, the first that changes it, falls evenly from level tau_max, rounded down, and is
    at 0 from step `settle` on. Between two anchors both lie on the straight line, rounded down; left of the first and
    right of the last they are as there.

    Args:
      points: (position, start, settle), in any order; or (position, start), which settles tau_max calls later.
      length: L, positions.
      tau_max: the level of pure noise, at least the calls that any position takes; by default the most of them.
      visibility: of the model that it is for: 'full', or 'prefix', which asks for the order from left to right.

    Raises:
      UserError: a broken rule of the module's list, with the place; a point outside the text, two at one position; a
        position that takes more than tau_max calls.

    >>> from_sketch([(0, 0, 2), (2, 1, 5)], length=3).levels.T.tolist()
    [[4, 2, 0, 0, 0, 0], [4, 2, 1, 0, 0, 0], [4, 4, 3, 2, 1, 0]]
    >>> from_sketch([(0, 4, 6), (4, 0, 2)], length=5, visibility="prefix")
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: sketch: got 'start 3 at position 1, start 4 at position 0'; allowed: positions that start
    from left to right, for a 'prefix' model
    """
    length = whole("length", length, 1)
    anchors = _anchors(points, length, tau_max)
    longest = max(settle - start for _, start, settle in anchors)
    tau_max = longest if tau_max is None else tau_max
    for position, start, settle in anchors:
        given, allowed = f"position {position} in calls {start} to {settle - 1}", f"at most tau_max = {tau_max} calls"
        require(settle - start <= tau_max, "sketch", given, allowed)
    start_L, settle_L = (_through(anchors, column, length) for column in (1, 2))
    step_Sx1 = np.arange(settle_L.max() + 1)[:, None]
    level_SxL = tau_max * (settle_L[None] - step_Sx1) // (settle_L - start_L)[None]
    return _checked(np.clip(level_SxL, 0, tau_max), visibility)


def from_drawing(rows: Any, visibility: str = "full") -> Hyperschedule:
    """A hyperschedule from a drawing: a row for each call, a mark for each position that the call works on.

    A position's marked calls lower its level evenly, rounded up, the last of them to 0; the one with the most marks
    passes through every level.

    Args:
      rows: texts of one length, '#' where the call works and '.' where not; or booleans [T, L].
      visibility: as in `from_sketch`.

    Raises:
      UserError: a broken rule of the module's list, with the place; anything that is no such drawing.

    >>> from_drawing(["##..", "####", "..##"]).levels.tolist()
    [[2, 2, 2, 2], [1, 1, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0]]
    >>> from_drawing(["#..", "#.#"])
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: sketch: got 'no call for position 1'; allowed: positions that all settle, each worked on
    by at least one call
    """
    marked_TxL = _marks(rows)
    count_L = marked_TxL.sum(0)
    for position in np.flatnonzero(count_L == 0)[:1]:
        allowed = "positions that all settle, each worked on by at least one call"
        require(False, "sketch", f"no call for position {position}", allowed)
    left_SxL = count_L - np.concatenate([np.zeros_like(count_L[None]), np.cumsum(marked_TxL, 0)])
    return _checked(-(-count_L.max() * left_SxL // count_L), visibility)


def _anchors(points: Iterable[Sequence[int]], length: int, tau_max: int | None) -> list[tuple[int, int, int]]:
    """(position, start, settle) by position, each checked on its own."""
    tau_max = tau_max if tau_max is None else whole("tau_max", tau_max, 1)
    anchors: dict[int, tuple[int, int, int]] = {}
    for point in map(tuple, points):
        require(len(point) in (2, 3), "sketch", point, "points (position, start) or (position, start, settle)")
        position = whole("sketch position", point[0], 0, length - 1, "the last position")
        start = whole(f"sketch start of position {position}", point[1], 0)
        require(len(point) == 3 or tau_max is not None, "tau_max", None, f"a whole number, since {point} has no settle")
        settle = whole(f"sketch settle of position {position}", point[2] if len(point) == 3 else start + tau_max, 0)
        given = f"position {position} settled at step {settle}, started by call {start}"
        require(start < settle, "sketch", given, "levels that never rise: a position settles after it starts")
        require(position not in anchors, "sketch", f"two points at position {position}", "one")
        anchors[position] = (position, start, settle)
    require(len(anchors) > 0, "sketch", [], "at least one point (position, start, settle)")
    return [anchors[position] for position in sorted(anchors)]


def _through(anchors: list[tuple[int, int, int]], column: int, length: int) -> np.ndarray:
    """[L]: the polygon through one column of the anchors, in exact fractions, rounded down."""

    def at(position: int) -> int:
        before = max((a for a in anchors if a[0] <= position), default=anchors[0])
        after = min((a for a in anchors if a[0] >= position), default=anchors[-1])
        rise, run = after[column] - before[column], after[0] - before[0]
        return before[column] + int(Fraction(rise * (position - before[0]), run or 1) // 1)

    return np.array([at(position) for position in range(length)])


def _marks(rows: Any) -> np.ndarray:
    """bool [T, L] of a drawing."""
    rows = list(rows)
    require(len(rows) > 0, "sketch", rows, "at least one row: a call")
    for call, row in enumerate(rows):
        given = f"{len(row)} positions at call {call}, {len(rows[0])} at call 0"
        require(len(row) == len(rows[0]) > 0, "sketch", given, "rows of one length")
        if isinstance(row, str):
            strange = sorted(set(row) - {WORKED, IDLE})
            require(not strange, "sketch", f"{''.join(strange)!r} at call {call}", f"{WORKED!r} and {IDLE!r} only")
    if isinstance(rows[0], str):
        return np.array([[mark == WORKED for mark in row] for row in rows])
    table = np.asarray(rows)
    is_drawing = table.dtype == bool and table.ndim == 2
    require(is_drawing, "sketch", f"{table.dtype}{list(table.shape)}", "texts or booleans [T, L]; levels: from_levels")
    return table


def _checked(level_SxL: np.ndarray, visibility: str) -> Hyperschedule:
    """The hyperschedule of levels [T+1, L] that fall from tau_max to 0 everywhere."""
    one_of("visibility", visibility, ("full", "prefix"))
    for call in np.flatnonzero((np.diff(level_SxL, axis=0) == 0).all(1))[:1]:
        require(False, "sketch", f"call {call}, which changes nothing", "calls that each lower some level")
    hs = from_levels(level_SxL)
    if visibility == "prefix":
        _check_order("start", hs.starts)
        _check_order("settle", (level_SxL > 0).sum(0))
    return hs


def _check_order(word: str, step_L: np.ndarray) -> None:
    """Refuses steps that fall from one position to the next."""
    for left in np.flatnonzero(np.diff(step_L) < 0)[:1]:
        given = f"{word} {step_L[left + 1]} at position {left + 1}, {word} {step_L[left]} at position {left}"
        require(False, "sketch", given, f"positions that {word} from left to right, for a 'prefix' model")
