"""Which noise each position carries in one pass over a batch of texts, and what its step weighs.

A pass shows every text at one moment of its generation (plain), at continuous times (flat), or at
one phase of a tileable hyperschedule, where the windows of the calls phase, phase + period, ... lie
side by side and every position is trained (tiled). In each case the expectation, over the draws,
of the weighted sum of per-position terms is the negative ELBO of the hyperschedule.

Letters: B texts, L positions, P period, T generation steps.
"""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.diffusion.noise_schedules import NoiseSchedule


class Phase(NamedTuple):
    """One pass over B texts; every field is [B, L].

    Attributes:
      alpha_t: float, survival before the step.
      alpha_s: float, survival after it; 1 where the step is the last.
      mask_weight: float, weight of a mask's term: (alpha_s - alpha_t) / (1 - alpha_t) times the number
        of steps that the draw stands for, or -alpha'(u) / (1 - alpha(u)) for continuous times.
      last_weight: float, weight of -log p(x | z) where the step is the last (alpha_s = 1), else 0.
      start: int32, first position of the window: of the text's one window, or of the position's own
        where windows lie side by side.
      stop: int32, end of that window.
      steps: float, number of steps that the draw stands for where the level falls, else 0; for continuous times
        -alpha'(u), the speed at which alpha falls.
    """

    alpha_t: Array
    alpha_s: Array
    mask_weight: Array
    last_weight: Array
    start: Array
    stop: Array
    steps: Array


def stratified(rng: Array, count: int) -> Array:
    """[count] uniforms in [0, 1), one in each of `count` strata of a randomly shifted circle.

    Each is marginally uniform; together they cover [0, 1) evenly.
    """
    shift_rng, jitter_rng = jax.random.split(rng)
    strata = jnp.arange(count) + jax.random.uniform(jitter_rng, (count,))
    return jnp.mod(strata / count + jax.random.uniform(shift_rng), 1.0)


def uniforms(rng: Array, count: int, variance: str) -> Array:
    """[count] uniforms in [0, 1), `stratified` unless `variance` is 'independent'."""
    return jax.random.uniform(rng, (count,)) if variance == "independent" else stratified(rng, count)


def continuous(
    u_B: Array,
    length: int,
    schedule: NoiseSchedule,
    alpha_max: float,
    reconstruction_share: float = 0.0,
    noise_range: tuple[float, float] = (0.0, 1.0),
) -> Phase:
    """Every position of a text at one noise fraction: the continuous-time limit of flat.

    Args:
      u_B: draws in [0, 1), one per text.
      length: L.
      schedule: noise fraction -> survival.
      alpha_max: the process's survival at 0+.
      reconstruction_share: q; texts with u < q are shown at the least noise there is and carry -log p(x | z) / q,
        the others take the noise fraction (u - q) / (1 - q) and weigh 1 / (1 - q).
      noise_range: the noise fractions, squeezed into this range; the weights stay those of the fraction.
    """
    q, (low, high) = reconstruction_share, noise_range
    at_zero = u_B < q
    # a fraction of exactly 0 would be clean text with an infinite weight
    fraction = jnp.clip(low + (high - low) * (u_B - q) / (1 - q), max(low, 1e-6), 1.0)
    alpha = jnp.minimum(schedule.alpha(fraction), alpha_max)
    speed = -schedule.derivative(fraction) / (1 - q)
    phase = Phase(
        alpha_t=jnp.where(at_zero, least_noise(schedule, alpha_max).astype(alpha.dtype), alpha),
        alpha_s=jnp.where(at_zero, 1.0, alpha),
        mask_weight=jnp.where(at_zero, 0.0, speed / jnp.maximum(1 - alpha, 1e-12)),
        last_weight=jnp.where(at_zero, 1 / max(q, 1e-12), 0.0),
        start=jnp.zeros(u_B.shape, jnp.int32),
        stop=jnp.full(u_B.shape, length, jnp.int32),
        steps=jnp.where(at_zero, 0.0, speed),
    )
    return _spread(phase, length)


def counted(u_B: Array, length: int, alpha_max: float, reconstruction_share: float = 0.0) -> tuple[Phase, Array]:
    """Continuous times by the number of masks: exactly l of a text's L tokens, l uniform over 1..L (LLaDA).

    For a network that does not see the noise level, and a schedule from 1 to 0, the time given the number of masks
    is integrated out: masks are any l of the tokens with equal chance, and weigh L / l (the mean of the weight
    1 / p over that time, whatever the schedule). Arguments as of `continuous`.

    Returns:
      the phase, with alpha = 1 - l / L, and l, int32 [B]; 0 for texts shown at 0+.

    >>> phase, masks_B = counted(jnp.array([0.0, 0.5, 0.99]), length=4, alpha_max=1.0)
    >>> masks_B.tolist(), [f"{x:.4f}" for x in phase.mask_weight[:, 0]]
    ([1, 3, 4], ['4.0000', '1.3333', '1.0000'])
    """
    q, B = reconstruction_share, u_B.shape[0]
    at_zero = u_B < q
    masks_B = jnp.clip(jnp.floor((u_B - q) / (1 - q) * length).astype(jnp.int32) + 1, 1, length)
    share = masks_B / length
    phase = Phase(
        alpha_t=jnp.where(at_zero, alpha_max, 1 - share),
        alpha_s=jnp.where(at_zero, 1.0, 1 - share),
        mask_weight=jnp.where(at_zero, 0.0, 1 / share / (1 - q)),
        last_weight=jnp.where(at_zero, 1 / max(q, 1e-12), 0.0),
        start=jnp.zeros(B, jnp.int32),
        stop=jnp.full(B, length, jnp.int32),
        steps=jnp.where(at_zero, 0.0, 1 / (1 - q)),
    )
    return _spread(phase, length), jnp.where(at_zero, 0, masks_B)


def _spread(phase_B: Phase, length: int) -> Phase:
    return jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (*x.shape, length)), phase_B)


def at_zero_plus(shape: tuple[int, int], schedule: NoiseSchedule, alpha_max: float) -> Phase:
    """Texts of a [B, L] shape at the least noise there is, each position with its reconstruction term."""
    one, zero = jnp.ones(shape), jnp.zeros(shape)
    start = jnp.zeros(shape, jnp.int32)
    return Phase(one * least_noise(schedule, alpha_max), one, zero, one, start, start + shape[1], zero)


def is_silent(hs: Hyperschedule, schedule: NoiseSchedule, alpha_max: float) -> bool:
    """Whether every position is either clean or pure noise at every step: one level, of survival 0.

    >>> from hdlm_jax.diffusion import hyperschedules, noise_schedules
    >>> [is_silent(hyperschedules.block(4, 2, rate), noise_schedules.linear(), alpha_max=1.0) for rate in (2, 1)]
    [True, False]
    """
    return not _alphas(hs.tau_max, schedule, alpha_max)[1:].any()


def least_noise(schedule: NoiseSchedule, alpha_max: float) -> Array:
    """The survival at 0+, a scalar: the schedule's, at most the process's `alpha_max`.

    >>> from hdlm_jax.diffusion.noise_schedules import linear
    >>> float(least_noise(linear(), alpha_max=1.0))
    1.0
    """
    return jnp.minimum(schedule.alpha(jnp.zeros(())), alpha_max)


def at_step(
    step_B: Array, origin_B: Array, length: int, hs: Hyperschedule, schedule: NoiseSchedule, alpha_max: float
) -> Phase:
    """Every text at one generation step of `hs`, its first `origin` positions given.

    The step is drawn from 0..T-1, so each changing position weighs T.
    """
    position_L = jnp.arange(length)

    def one(step, origin):
        relative_L = position_L - origin
        inside_L = jnp.clip(relative_L, 0, hs.length - 1)
        level_t = jnp.where(relative_L < 0, 0, hs.levels_at(step)[inside_L])
        level_s = jnp.where(relative_L < 0, 0, hs.levels_at(step + 1)[inside_L])
        start, stop = hs.window(step)
        return level_t, level_s, start + origin, jnp.minimum(stop + origin, length)

    level_t, level_s, start_B, stop_B = jax.vmap(one)(step_B, origin_B)
    spread = lambda bound_B: jnp.broadcast_to(bound_B[:, None], level_t.shape).astype(jnp.int32)
    return _discrete(level_t, level_s, hs, schedule, alpha_max, hs.num_steps, spread(start_B), spread(stop_B))


def tiled(
    rng: Array,
    origin_B: Array,
    hs: Hyperschedule,
    schedule: NoiseSchedule,
    alpha_max: float,
    noise_range: tuple[float, float] = (0.0, 1.0),
    variance: str = "stratified",
) -> Phase:
    """Every position of every text in the one call that has it active and is congruent to the phase.

    Block hyperschedules draw a phase per block, the others one per text; stratified phases are so over the batch
    and over each text.
    """
    B, P, draws = origin_B.shape[0], hs.period, hs.num_groups
    low, high = noise_range
    # blocks of one text lie B strata apart; what precedes and what follows origins is stratified on its own
    split = jax.random.split(rng)
    u_2xGxB = jnp.stack([uniforms(one, draws * B, variance).reshape(draws, B) for one in split])
    fraction_BxG = low + (high - low) * u_2xGxB.reshape(2 * draws, B).T
    return at_phase(P - 1 - jnp.floor(fraction_BxG * P).astype(jnp.int32), origin_B, hs, schedule, alpha_max)


def at_phase(phase_BxG: Array, origin_B: Array, hs: Hyperschedule, schedule: NoiseSchedule, alpha_max: float) -> Phase:
    """`tiled` at given phases.

    A text with an origin is two texts, each under its own run of `hs`: what lies before the origin and what follows
    it as after a prompt.

    Args:
      phase_BxG: int32 in 0..P-1, of the groups of what precedes the origin, then of those of what follows it.
    """
    L, P, draws = hs.length, hs.period, hs.num_groups
    position_L = jnp.arange(L)
    after_BxL = position_L[None, :] >= origin_B[:, None]
    relative_BxL = jnp.where(after_BxL, position_L[None, :] - origin_B[:, None], position_L[None, :])
    group_BxL = hs.group_of(relative_BxL)
    phase_BxL = jnp.take_along_axis(phase_BxG, group_BxL + draws * after_BxL, axis=1)
    start_BxL = hs.start_of(relative_BxL)
    step_BxL = start_BxL + jnp.mod(phase_BxL - start_BxL, P)
    level_t, level_s = hs.level_of(relative_BxL, step_BxL), hs.level_of(relative_BxL, step_BxL + 1)
    key_BxL = jnp.stack([step_BxL, group_BxL, after_BxL.astype(step_BxL.dtype)])
    first, end = _runs(key_BxL)
    return _discrete(level_t, level_s, hs, schedule, alpha_max, P, first, end)


def survival(level: Array, tau_max: int, schedule: NoiseSchedule, alpha_max: float) -> Array:
    """Alpha of levels 0..tau_max: exactly 1 at level 0, at most the process's `alpha_max` above it.

    >>> from hdlm_jax.diffusion.noise_schedules import linear
    >>> survival(jnp.arange(5), 4, linear(), alpha_max=1.0).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return jnp.asarray(_alphas(tau_max, schedule, alpha_max), jnp.result_type(float))[level]


@cache
def _alphas(tau_max: int, schedule: NoiseSchedule, alpha_max: float) -> np.ndarray:
    """float64 [tau_max + 1]. A table, since a compiled 1 - level / tau_max may miss 0, even fall below it."""
    with jax.enable_x64(), jax.ensure_compile_time_eval():
        alpha = np.array(schedule.alpha(np.arange(tau_max + 1) / tau_max))
    alpha = np.minimum(alpha, alpha_max)
    alpha[0] = 1.0
    return alpha


def _runs(key_KxBxL: Array) -> tuple[Array, Array]:
    """First position and end of the run of equal keys that each position lies in, int32 [B, L] each.

    >>> first, end = _runs(jnp.array([[[4, 4, 5, 5, 5]]]))
    >>> first.tolist(), end.tolist()
    ([[0, 0, 2, 2, 2]], [[2, 2, 5, 5, 5]])
    """
    L = key_KxBxL.shape[-1]
    new_BxL1 = (key_KxBxL[..., 1:] != key_KxBxL[..., :-1]).any(0)
    position_L = jnp.arange(L, dtype=jnp.int32)
    opens = jnp.pad(new_BxL1, ((0, 0), (1, 0)), constant_values=True)
    closes = jnp.pad(new_BxL1, ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(opens, position_L[None, :], 0), axis=1)
    last = jax.lax.cummin(jnp.where(closes, position_L[None, :], L - 1), axis=1, reverse=True)
    return first, last + 1


def _discrete(level_t, level_s, hs, schedule, alpha_max, steps, start_BxL, stop_BxL) -> Phase:
    alpha_t, alpha_s = (survival(level, hs.tau_max, schedule, alpha_max) for level in (level_t, level_s))
    changes = level_s < level_t
    # a schedule may round to 1 above level 0: nothing is masked there
    weight = steps * (alpha_s - alpha_t) / jnp.where(alpha_t < 1, 1 - alpha_t, 1.0)
    last = jnp.where(changes & (level_s == 0), float(steps), 0.0)
    return Phase(alpha_t, alpha_s, weight, last, start_BxL, stop_BxL, jnp.where(changes, float(steps), 0.0))
