"""Hyperschedules: every position's own noise level at every generation step.

A hyperschedule is an integer array tau[step, i] with steps 0 (pure noise) to T (clean text) and levels from
tau_max (pure noise) down to 0 (clean) that never rise (Fathi, Scholak, Noël, "Unifying Autoregressive and
Diffusion-Based Sequence Generation", arXiv 2504.06416). All kinds but AR-Diffusion and given tables follow

    tau[step, i] = clip(start_i + tau_max - step, 0, tau_max),

where start_i is the first call that changes position i. So nothing is stored: `levels_at` costs O(L) and
`window` O(1), in plain integers and inside `jax.jit`. Position i is *worthless* before its first call, then
*active* until it reaches level 0, then *settled*.

>>> hs = slide(length=6, width=4, rate=2)
>>> print(hs)
slide: L=6, width 4, rate 2, tau_max 2, T=4 calls, 2 window rows per token
>>> hs.levels.tolist()
[[2, 2, 2, 2, 2, 2], [1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]
>>> [hs.window(step) for step in range(hs.num_steps)]
[(0, 2), (0, 4), (2, 6), (4, 6)]
>>> hs.with_prompt(4)
slide(length=6, width=4, rate=2).with_prompt(4)
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.diffusion.fields import arguments, whole, width_and_rate, within_int32
from hdlm_jax.diffusion.level_laws import (
    Line,
    Staircase,
    Table,
    Timeline,
    check_levels,
    integer_table,
    module_of,
    timeline_of,
)
from hdlm_jax.errors import choose, require

SETTLED, ACTIVE, WORTHLESS = 0, 1, 2


@dataclass(frozen=True, repr=False)
class Hyperschedule:
    """Noise levels by step and position: an immutable, comparable, hashable value (a static `jit` argument).

    Steps before 0 read as step 0 with nothing started, steps after `num_steps` as the end with everything
    settled. Built by the functions below.

    Attributes:
      kind: the builder's name.
      length: L, positions.
      law: formula or table of the levels of the positions after the prompt.
      arguments: the builder's arguments after `length`, as (name, value) pairs.
      prompt: how many of the first positions are given (`with_prompt`).
    """

    kind: str
    length: int
    law: Staircase | Line | Table
    arguments: tuple[tuple[str, Any], ...] = ()
    prompt: int = 0

    @property
    def free(self) -> int:
        """Positions after the prompt."""
        return self.length - self.prompt

    @property
    def tau_max(self) -> int:
        """The level of pure noise: level l stands for the noise fraction l / tau_max."""
        return self.law.tau_max

    @property
    def num_steps(self) -> int:
        """T, the number of model calls."""
        return self.law.num_steps(self.free) if self.free else 0

    @property
    def width(self) -> int:
        """Positions in the largest window; less than asked for where a prompt leaves fewer."""
        if isinstance(self.law, Staircase):
            return int(self.law.count(self.tau_max, min(self.law.block, self.free)))
        return int(np.diff(self._timeline.windows).max())

    @property
    def rate(self) -> Fraction:
        """width / tau_max, tokens settled per call."""
        return Fraction(self.width, self.tau_max)

    @property
    def cost(self) -> Fraction:
        """Window rows fed to the network per generated token: tau_max if windows hold active rows only."""
        if isinstance(self.law, Staircase):
            return Fraction(self.tau_max)
        generated = int((self._timeline.start_L >= 0).sum())
        return Fraction(int(np.diff(self._timeline.windows).sum()), max(generated, 1))

    @property
    def settles_prefix(self) -> bool:
        """Whether settled, active and worthless positions follow each other in this order at every step."""
        if isinstance(self.law, Staircase):
            return True
        return all(bool((np.diff(x_L) >= 0).all()) for x_L in self._timeline[:2])

    @property
    def period(self) -> int | None:
        """P of the tiled layout: the windows of calls phase, phase + P, .. are disjoint and cover the text.

        tau_max for quenched, block, slide and block_slide. A table has one if it settles left to right and
        every position is active for the same number of calls, which is P. None otherwise, and for flat and
        ar_diffusion, whose one window holds nearly the whole text: these train in the plain layout.
        """
        if self.kind in ("flat", "ar_diffusion") or not self.settles_prefix:
            return None
        if isinstance(self.law, Staircase):
            return self.tau_max
        active = {int(calls) for calls in self._timeline.settle_L - self._timeline.start_L if calls}
        return active.pop() if len(active) == 1 else None

    @property
    def num_groups(self) -> int:
        """How many runs of positions never share a window: the blocks of block and block_slide, else 1."""
        return -(-self.free // self.law.block) if isinstance(self.law, Staircase) else 1

    @property
    def starts(self) -> np.ndarray:
        """numpy int32 [L], the first call that changes each position; -tau_max for given ones."""
        return self.start_of(np.arange(self.length))

    def group_of(self, position: Any) -> Any:
        """The group (0..num_groups-1, see there) of positions 0..L-1, an int or integers of any shape."""
        if not isinstance(self.law, Staircase):
            return position * 0
        return module_of(position).maximum(position - self.prompt, 0) // self.law.block

    def start_of(self, position: Any) -> Any:
        """The first call that changes a position, exactly, O(1) each; -tau_max for given ones and left of 0.

        Args:
          position: an int, or integers of any shape (numpy; JAX, inside `jit` too).

        Returns:
          An int for an int, else int32 of the same shape. The closed forms go on right of position L.
        """
        if isinstance(position, int):
            return int(self.start_of(np.asarray(position)))
        xp, j = module_of(position), position - self.prompt
        if isinstance(self.law, Staircase):
            start = self.law.start(xp.maximum(j, 0))
        else:
            start = xp.asarray(self._timeline.start_L)[xp.clip(position, 0, self.length - 1)]
        return xp.where(j < 0, -self.tau_max, start).astype(np.int32)

    def level_of(self, position: Any, step: Any) -> Any:
        """int32 level of each position at its own step: integers of one shape, or a scalar step for all.

        Positions before the prompt's end, and left of 0, are at level 0.
        """
        xp, j = module_of(position, step), position - self.prompt
        if not self.free:
            return xp.zeros(xp.shape(position), np.int32)
        level = self.law.levels(xp.maximum(j, 0), xp.maximum(step, 0), self.free)
        return xp.where(j < 0, 0, level).astype(np.int32)

    def levels_at(self, step: Any) -> jax.Array:
        """int32 [L], the levels at a step (int or traced integer scalar), in O(L)."""
        return self.level_of(jnp.arange(self.length, dtype=jnp.int32), step)

    @property
    def levels(self) -> jax.Array:
        """int32 [T+1, L], the levels at every step, by one jitted program."""
        return _all_levels(self)

    def window(self, step: Any) -> tuple[Any, Any]:
        """(start, stop) of the smallest interval that holds the active positions of the call step -> step+1.

        Ints for an int; int32 for a (traced) JAX integer, of its shape. start = stop where nothing is active.
        """
        if isinstance(self.law, Staircase):
            start, stop = self.law.window(step, self.free)
            start, stop = start + self.prompt, stop + self.prompt
        else:
            xp, windows = module_of(step), self._timeline.windows
            row = xp.clip(step + 1, 0, len(windows) - 1)
            start, stop = xp.asarray(windows[:, 0])[row], xp.asarray(windows[:, 1])[row]
        if isinstance(step, jax.Array):
            return start.astype(jnp.int32), stop.astype(jnp.int32)
        return int(start), int(stop)

    def regions(self, step: Any) -> jax.Array:
        """int8 [L] at a step (int or traced integer scalar): 0 settled, 1 active, 2 worthless."""
        started_L = self.levels_at(step + 1) < self.tau_max
        region_L = jnp.where(started_L, jnp.int8(ACTIVE), jnp.int8(WORTHLESS))
        return jnp.where(self.levels_at(step) == 0, jnp.int8(SETTLED), region_L)

    def with_prompt(self, n: int) -> "Hyperschedule":
        """The first `n` positions given (level 0 throughout), the schedule for length L - n moved right by n.

        A second prompt replaces the first. A table's schedule for a shorter length is that of its first
        positions, up to the step where they have settled. `UserError` unless 0 <= n <= L.
        """
        return replace(self, prompt=whole("hyperschedule.prompt", n, 0, self.length))

    def validate(self) -> "Hyperschedule":
        """Returns itself; `UserError` with the reason and the place (step, position) of a bad level."""
        check_levels(self._numpy_levels, self.tau_max)
        return self

    def describe(self) -> str:
        """One line: kind, length, width, rate, levels, calls and cost."""
        prompt = f", prompt {self.prompt}" if self.prompt else ""
        cost = self.cost if self.cost.denominator == 1 else f"{float(self.cost):.1f}"
        return (
            f"{self.kind}: L={self.length}{prompt}, width {self.width}, rate {self.rate}, "
            f"tau_max {self.tau_max}, T={self.num_steps} calls, {cost} window rows per token"
        )

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in (("length", self.length), *self.arguments))
        return f"{self.kind}({arguments})" + (f".with_prompt({self.prompt})" if self.prompt else "")

    def _repr_png_(self) -> bytes:
        from hdlm_jax.visual import figures

        return figures.png(figures.hyperschedule(self))

    @property
    def _numpy_levels(self) -> np.ndarray:
        step_T, position_L = np.arange(self.num_steps + 1), np.arange(self.length)
        return self.level_of(position_L[None, :], step_T[:, None])

    @cached_property
    def _timeline(self) -> Timeline:
        return timeline_of(self._numpy_levels, self.tau_max)


@partial(jax.jit, static_argnums=0)
def _all_levels(hs: Hyperschedule) -> jax.Array:
    return jax.vmap(hs.levels_at)(jnp.arange(hs.num_steps + 1, dtype=jnp.int32))


def quenched(length: int) -> Hyperschedule:
    """One position per call, left to right: autoregression. start_i = i, tau_max = 1."""
    length = whole("hyperschedule.length", length, 1)
    return _staircase("quenched", length, (), Staircase(1, length, length, 1, 1))


def flat(length: int, steps: int) -> Hyperschedule:
    """All positions at one level, `steps` = tau_max calls: ordinary diffusion. start_i = 0."""
    length, steps = whole("hyperschedule.length", length, 1), whole("hyperschedule.steps", steps, 1)
    return _staircase("flat", length, (("steps", steps),), Staircase(steps, length, steps))


def block(length: int, width: int, rate: Any) -> Hyperschedule:
    """Blocks of `width` positions, one after the other, each flat. start_i = tau_max floor(i / width).

    Args:
      length: L; it need not be a multiple of the width.
      width: positions per block, 1 <= width <= L.
      rate: tokens per call, 0 < rate <= width: an int, a Fraction, a float such as 1.5 or text such as
        '3/2'; width / rate = tau_max must be a whole number.

    Raises:
      UserError: for anything else, naming the nearest rates and widths that work.
    """
    length = whole("hyperschedule.length", length, 1)
    width, rate, tau_max = width_and_rate(width, rate, length, "the length")
    return _staircase("block", length, (("width", width), ("rate", rate)), Staircase(tau_max, width, tau_max))


def slide(length: int, width: int, rate: Any) -> Hyperschedule:
    """A window of `width` positions that moves on by `rate` per call. start_i = floor(i / rate).

    In the call step -> step+1 the window is stop = min(L, ceil(rate (step+1))) and
    start = clip(ceil(rate (step+1)) - width, 0, L). Arguments and errors as for `block`.

    >>> slide(length=7, width=6, rate="3/2").starts.tolist()
    [0, 0, 1, 2, 2, 3, 4]
    """
    length = whole("hyperschedule.length", length, 1)
    width, rate, tau_max = width_and_rate(width, rate, length, "the length")
    arguments = (("width", width), ("rate", rate))
    return _staircase("slide", length, arguments, _restarted(length, tau_max, rate))


def block_slide(length: int, block: int, width: int, rate: Any) -> Hyperschedule:
    """A slide started anew in each block of `block` positions, when the block before has settled.

    start_i = floor(i / block) (floor((block - 1) / rate) + tau_max) + floor((i mod block) / rate).
    1 <= width <= block <= L; otherwise arguments and errors as for `block`.
    """
    length = whole("hyperschedule.length", length, 1)
    block = whole("hyperschedule.block", block, 1, length, "the length")
    width, rate, tau_max = width_and_rate(width, rate, block, "the block")
    arguments = (("block", block), ("width", width), ("rate", rate))
    return _staircase("block_slide", length, arguments, _restarted(block, tau_max, rate))


def ar_diffusion(length: int, steps: int) -> Hyperschedule:
    """The rounded line of AR-Diffusion (Wu et al. 2023, arXiv 2305.09515), from noise to text.

    tau_max = steps - L + 1. With k = steps - step, the levels lie on the line through (position, level) =
    (max(L-1-k, 0), max(k-(L-1), 0)) and (2L, tau_max), rounded half to even and clipped to 0..tau_max.
    The left positions are the cleaner ones, and the window is nearly the whole text. `UserError` unless
    steps >= L.
    """
    length = whole("hyperschedule.length", length, 1)
    steps = whole("hyperschedule.steps", steps, length)
    within_int32("hyperschedule.steps", steps, 2 * length * (steps + 1))
    return Hyperschedule("ar_diffusion", length, Line(steps - length + 1), (("steps", steps),))


def from_levels(levels: Any) -> Hyperschedule:
    """A hyperschedule from its levels, integers [T+1, L] in any array or nested list.

    Levels never rise from step to step; each position starts at tau_max, the largest level, and ends at 0, or
    is given: at 0 throughout. Positions may wait at a level or skip levels.

    Raises:
      UserError: if not, with the reason and the place.

    >>> print(from_levels([[2, 2, 2], [1, 1, 2], [0, 0, 1], [0, 0, 0]]))
    from_levels: L=3, width 3, rate 3/2, tau_max 2, T=3 calls, 2 window rows per token
    """
    return _table("from_levels", integer_table(levels))


def from_function(f: Callable[[Any, Any], Any], length: int, num_steps: int) -> Hyperschedule:
    """A hyperschedule from `f(step, position)`, called once with integer arrays [T+1, 1] and [1, L].

    The result broadcasts to [T+1, L] and obeys the rules of `from_levels`.

    >>> ladder = from_function(lambda step, i: (i // 2 + 3 - step).clip(0, 3), length=4, num_steps=4)
    >>> ladder.width, ladder.rate, ladder.period
    (4, Fraction(4, 3), 3)
    """
    length = whole("hyperschedule.length", length, 1)
    num_steps = whole("hyperschedule.num_steps", num_steps, 1)
    levels = f(np.arange(num_steps + 1)[:, None], np.arange(length)[None, :])
    return _table("from_function", integer_table(levels, (num_steps + 1, length)))


BUILDERS: dict[str, Callable[..., Hyperschedule]] = {
    builder.__name__: builder for builder in (quenched, flat, block, slide, block_slide, ar_diffusion)
}


def build(kind: str, length: int, **fields: Any) -> Hyperschedule:
    """The hyperschedule that a config names: `BUILDERS[kind](length, **fields)`; None counts as not given.

    Raises:
      UserError: for an unknown kind, and for fields that are unknown, missing or out of range, by name
        ('hyperschedule.width').

    >>> build("slide", 8, width=4, rate="1/2", block=None)
    slide(length=8, width=4, rate=1/2)
    >>> build("slide", 8, width=4)
    Traceback (most recent call last):
    ...
    hdlm_jax.errors.UserError: hyperschedule.rate: got None; allowed: a value, since 'slide' needs one
    """
    builder = choose("hyperschedule.kind", kind, BUILDERS)
    return builder(length, **arguments("hyperschedule", kind, builder, fields, skip=1))


def _staircase(kind: str, length: int, arguments: tuple, law: Staircase) -> Hyperschedule:
    largest = 2 * length * law.num + law.num_steps(length) + 2 * law.stride
    within_int32("hyperschedule.length", length, largest)
    return Hyperschedule(kind, length, law, arguments)


def _restarted(block: int, tau_max: int, rate: Fraction) -> Staircase:
    """A slide over each block, begun when the block before has settled."""
    stride = (block - 1) * rate.denominator // rate.numerator + tau_max
    return Staircase(tau_max, block, stride, rate.denominator, rate.numerator)


def _table(kind: str, levels: np.ndarray) -> Hyperschedule:
    tau_max = int(levels[0].max())
    allowed = "some position that starts above level 0"
    require(tau_max > 0, "hyperschedule.levels", levels[0].tolist(), allowed)
    check_levels(levels, tau_max)
    within_int32("hyperschedule.levels", levels.shape, tau_max + len(levels))
    law = Table(tau_max, levels.shape, np.ascontiguousarray(levels, np.int32).tobytes())
    return Hyperschedule(kind, levels.shape[1], law, (("num_steps", len(levels) - 1),))
