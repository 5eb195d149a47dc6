"""Generation as a `lax.scan` over the steps of a hyperschedule; nothing returns to the host inside.

Two loops draw from the same chain. `recomputed` feeds all rows at every step: the loop of `full`
models, and the slow twin of `cached`. `cached` feeds only the rows settled by the last call and the
window: the loop of `prefix` models, at a cost per token that does not grow with the text.

What is given stays: the tokens marked in given_BxL. The hyperschedule starts at each text's origin, the end of its
prompt (`origins`); given tokens behind it are clean rows of the window that no step changes.

Letters: B texts, L positions, W window rows, C settling rows fed with a window, S cache slots, T steps.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import phases, visibility
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.diffusion.noise_schedules import NoiseSchedule
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.reverse import ReverseStep
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models import layouts
from hdlm_jax.models.attention import cached as cached_attention
from hdlm_jax.models.attention import dense
from hdlm_jax.models.transformer import TransformerConfig, forward, logits, rotary_rows, unstacked

SEGMENTS, SLOTS = 8, 64  # a scan is cut into at most so many segments, each a multiple of so many slots longer


class Chain(NamedTuple):
    """What defines the chain that generates: network, hyperschedule, noising, reverse step."""

    config: TransformerConfig
    hs: Hyperschedule
    schedule: NoiseSchedule
    process: NoisingProcess
    reverse: ReverseStep
    shape_logits: Callable[[Array], Array] = lambda scores: scores  # temperature, top-k, top-p
    cache_dtype: str = ""  # of keys and values; '' is that of the activations

    def alpha(self, level: Array) -> Array:
        """Survival of levels."""
        return phases.survival(level, self.hs.tau_max, self.schedule, self.process.alpha_max)

    def sigma(self, alpha_BxR: Array) -> Array | None:
        """Noise levels for a conditioned network, else None."""
        return self.schedule.sigma(alpha_BxR) if self.config.conditioning else None


def recomputed(
    chain: Chain,
    params: dict,
    rng_B: Array,
    x_BxL: Array,
    given_BxL: Array,
    record: bool = False,
    steps: int | None = None,
) -> tuple[Array, Array | None]:
    """Generates by feeding all rows at every step.

    Args:
      chain: the chain.
      params: network parameters.
      rng_B: one PRNG key per text: a text does not depend on the batch it is in.
      x_BxL: int32; what is given, and noise of the prior.
      given_BxL: bool; the tokens that stay.
      record: also return the tokens after every step.
      steps: stop after so many (default: all).

    Returns:
      finished tokens [B, L], and [T, B, L] or None.
    """

    def body(x, step):
        phase, scores = recomputed_logits(chain, params, x, given_BxL, step)
        x = _reverse(chain, rng_B, step, x, scores, phase.alpha_t, phase.alpha_s)
        return x, (x if record else None)

    return jax.lax.scan(body, x_BxL, jnp.arange(steps or chain.hs.num_steps))


def recomputed_logits(
    chain: Chain, params: dict, x_BxL: Array, given_BxL: Array, step: Array
) -> tuple[phases.Phase, Array]:
    """The phase of `step` and the scores [B, L, V] of all rows (meaningful at active positions)."""
    origin_B = origins(chain, given_BxL)
    step_B = jnp.broadcast_to(step, origin_B.shape)
    phase = phases.at_step(step_B, origin_B, x_BxL.shape[1], chain.hs, chain.schedule, chain.process.alpha_max)
    alphas = (jnp.where(given_BxL, 1.0, alpha) for alpha in (phase.alpha_t, phase.alpha_s))
    phase = phase._replace(**dict(zip(("alpha_t", "alpha_s"), alphas, strict=True)))
    rows = layouts.plain(chain.config, x_BxL, phase, trailing_row(chain))
    hidden, _ = forward(
        chain.config, params, rows.tokens, rows.positions, rows.attention, sigma_BxR=chain.sigma(rows.alpha)
    )
    first, end = rows.predicting
    return phase, logits(chain.config, params, hidden[:, first:end])


def cached(
    chain: Chain,
    params: dict,
    rng_B: Array,
    x_BxL: Array,
    given_BxL: Array,
    longest_prompt: int,
    record: bool = False,
) -> tuple[Array, Array | None]:
    """Generates with the exact cache; arguments and results as `recomputed`.

    Args:
      longest_prompt: static upper bound of the origins.
    """
    params = unstacked(chain.config, params)
    plan = _plan(chain, x_BxL.shape[1], longest_prompt)
    dtype = chain.cache_dtype or (params["embedding"].dtype if chain.config.dtype == "float32" else chain.config.dtype)
    cache = kv_cache.empty(chain.config, x_BxL.shape[0], plan[0].slots, dtype)
    if longest_prompt:
        cache = _prefill(chain, params, cache, x_BxL, longest_prompt)
    history = []
    for segment in plan:
        carry = (x_BxL, kv_cache.grow(cache, segment.slots))
        (x_BxL, cache), tokens = _run(chain, params, rng_B, given_BxL, segment, carry, record)
        history.append(tokens)
    return x_BxL, (jnp.concatenate(history) if record else None)


def origins(chain: Chain, given_BxL: Array) -> Array:
    """int32 [B]: where generation starts, behind the tokens given at the front.

    Where settled rows see whole groups, the last group of a prompt may lack tokens: it is generated with the window.
    """
    group = 1 if chain.config.inexact_context else chain.config.context_group
    return jnp.cumprod(given_BxL.astype(jnp.int32), axis=1).sum(1) // group * group


def granularity(length: int) -> int:
    """Cache slots by which a segment of the scan grows: attention runs over little more than the filled part.

    >>> [granularity(length) for length in (100, 512, 1024, 2048)]
    [64, 64, 128, 256]
    """
    return -(-length // (SEGMENTS * SLOTS)) * SLOTS


class Segment(NamedTuple):
    """Steps [first, end) that run over `slots` cache slots."""

    first: int
    end: int
    slots: int


def _plan(chain: Chain, length: int, longest_prompt: int) -> list[Segment]:
    """Cuts the steps where the window's start passes a multiple of `granularity` slots."""
    hs, stride = chain.hs, chain.hs.tau_max if _settles_at_once(chain.hs) else 1
    grain, segments, first = granularity(length), [], 0
    while first < hs.num_steps:
        slots = min((longest_prompt + hs.window(first)[0]) // grain * grain + grain, length)
        low, high = first + stride, hs.num_steps
        while low < high:  # the first step whose window starts past the slots, unless they hold whole texts
            middle = (low + high) // 2
            past = slots < length and longest_prompt + hs.window(middle)[0] > slots
            low, high = (low, middle) if past else (middle + 1, high)
        end = min(hs.num_steps, first + max(1, (low - first) // stride) * stride)
        segments.append(Segment(first, end, slots))
        first = end
    return segments


def _settles_at_once(hs: Hyperschedule) -> bool:
    """Whether the window stands still for tau_max calls, then moves on as a whole."""
    return hs.kind == "block"


def _run(chain, params, rng_B, given_BxL, segment, carry, record):
    call = functools.partial(_call, chain, params, rng_B, given_BxL, record)
    steps = jnp.arange(segment.first, segment.end)
    if not _settles_at_once(chain.hs):
        return jax.lax.scan(functools.partial(call, settling_rows(chain)), carry, steps)

    def block(carry, steps_P):
        (x_BxL, cache), first = call(settling_rows(chain), carry, steps_P[0])

        def later(x_BxL, step):  # the cache rests: carried along, XLA would copy it
            (x_BxL, _), tokens = call(0, (x_BxL, cache), step)
            return x_BxL, tokens

        x_BxL, rest = jax.lax.scan(later, x_BxL, steps_P[1:])
        return (x_BxL, cache), (jnp.concatenate([first[None], rest]) if record else None)

    carry, tokens = jax.lax.scan(block, carry, steps.reshape(-1, chain.hs.tau_max))
    return carry, (tokens.reshape(-1, *tokens.shape[2:]) if record else None)


def settling_rows(chain: Chain) -> int:
    """C, the most rows that one call settles; 0 where the window's one row is its own settled row."""
    return 0 if lone_row(chain) else _most_settled(chain.hs)


def lone_row(chain: Chain) -> bool:
    """Whether the window is one row of a shifted model: it holds a settled token and enters the cache itself."""
    return chain.config.prediction == "shifted" and chain.hs.width == 1 and not trailing_row(chain)


@functools.cache
def _most_settled(hs: Hyperschedule) -> int:
    starts = [hs.window(step)[0] for step in range(hs.num_steps)]
    return max((b - a for a, b in itertools.pairwise(starts)), default=0)


def trailing_row(chain: Chain) -> bool:
    """Whether the window of a shifted model is followed by the row that holds its last token."""
    return chain.config.prediction == "shifted" and visibility.trailing_row_matters(chain.hs, chain.schedule)


def _call(chain, params, rng_B, given_BxL, record, settling, carry, step):
    """One call: settled rows enter the cache, the window moves one step."""
    x_BxL, cache = carry
    scores, cache = window_logits(chain, params, cache, x_BxL, given_BxL, step, settling)
    relative_W = chain.hs.window(step)[0] + jnp.arange(chain.hs.width)
    level_W = chain.hs.level_of(relative_W, step)
    next_W = chain.hs.level_of(relative_W, step + 1)
    place_BxW = origins(chain, given_BxL)[:, None] + relative_W[None, :]
    at = lambda y_BxL: jnp.take_along_axis(y_BxL, place_BxW, 1, mode="clip")
    inside_BxW = (place_BxW < x_BxL.shape[1]) & (relative_W < chain.hs.window(step)[1])[None, :]
    alpha_t = jnp.where(at(given_BxL), 1.0, chain.alpha(level_W)[None])
    alpha_s = jnp.where(inside_BxW & ~at(given_BxL), chain.alpha(next_W)[None], alpha_t)
    z_BxW = _reverse(chain, rng_B, step, at(x_BxL), scores, alpha_t, alpha_s)
    place_BxW = jnp.where(inside_BxW, place_BxW, x_BxL.shape[1])
    x_BxL = x_BxL.at[jnp.arange(x_BxL.shape[0])[:, None], place_BxW].set(z_BxW, mode="drop")
    return (x_BxL, cache), (x_BxL if record else None)


def window_logits(
    chain: Chain,
    params: dict,
    cache: kv_cache.Cache,
    x_BxL: Array,
    given_BxL: Array,
    step: Array,
    settling: int,
) -> tuple[Array, kv_cache.Cache]:
    """Feeds `settling` rows before the window and the window; returns its scores [B, W, V] and the cache.

    Row layout: C settling rows, W window rows, one trailing row where it matters. Rows before position
    0, past the text or past the window see only themselves.
    """
    config, hs, origin_B = chain.config, chain.hs, origins(chain, given_BxL)
    start, stop = hs.window(step)
    W, trailing = hs.width, trailing_row(chain)
    offset_R = jnp.arange(-settling, W + trailing)
    relative_R = start + offset_R
    row_BxR = origin_B[:, None] + relative_R[None, :]
    end_B = jnp.minimum(stop + origin_B, x_BxL.shape[1]) + trailing
    live_BxR = (row_BxR >= 0) & (row_BxR < end_B[:, None])
    shift = config.prediction == "shifted"
    held = lambda y_BxL: jnp.take_along_axis(y_BxL, row_BxR - shift, 1, mode="clip")
    held_BxR = held(x_BxL)
    if shift:
        held_BxR = jnp.where(row_BxR == 0, config.bos_id, held_BxR)
    window_R = offset_R >= 0
    alpha_BxR = jnp.where(held(given_BxL), 1.0, chain.alpha(hs.level_of(relative_R - shift, step))[None])
    settled = visibility.settled_sees(relative_R[:, None], relative_R[None, :], config.context_group)
    sees_RxR = jnp.where(window_R[:, None], True, settled)
    own_RxR = offset_R[:, None] == offset_R[None, :]
    visible = (live_BxR[:, :, None] & live_BxR[:, None, :] & sees_RxR[None]) | own_RxR[None]
    slot_S = jnp.arange(kv_cache.num_slots(cache))
    filled_B = origin_B + start - settling
    past = visibility.active_sees_settled(filled_B[:, None, None], slot_S[None, None, :])
    hidden, new = forward(
        config,
        params,
        held_BxR,
        layouts.row_positions(config, row_BxR),
        cached_attention(past, visible),
        sigma_BxR=chain.sigma(alpha_BxR),
        rotary=rotary_rows(config, params, x_BxL.shape[1], layouts.row_positions(config, row_BxR)),
        past=cache,
        return_kv=True,
    )
    entering = 1 if lone_row(chain) else settling
    if entering:
        rows = jax.tree.map(lambda x: x[:, :, :entering], new)
        cache = kv_cache.write(cache, rows, row_BxR[:, :entering], after_B=hidden[:, 0, 0])
    return logits(config, params, hidden[:, settling : settling + W]), cache


def _prefill(chain, params, cache, x_BxL, longest_prompt):
    """Settles the prompts in one pass; slots past a shorter prompt are rewritten before they are seen."""
    config = chain.config
    row_P = jnp.arange(longest_prompt)
    tokens = layouts.held(config, x_BxL, longest_prompt, config.bos_id)
    positions = jnp.broadcast_to(layouts.row_positions(config, row_P)[None], tokens.shape)
    settled = visibility.settled_sees(row_P[:, None], row_P[None, :], config.context_group)[None]
    clean = chain.sigma(jnp.ones(tokens.shape, params["embedding"].dtype))
    _, rows = forward(config, params, tokens, positions, dense(settled), sigma_BxR=clean, return_kv=True)
    cache = kv_cache.grow(cache, max(kv_cache.num_slots(cache), longest_prompt))
    return kv_cache.write(cache, rows, jnp.broadcast_to(row_P[None], tokens.shape))


def _reverse(chain, rng_B, step, z_BxW, scores_BxWxV, alpha_t_BxW, alpha_s_BxW):
    """One reverse step with a key per text, so that a text is the same alone and in any batch."""
    one = lambda rng, *row: chain.reverse.step(jax.random.fold_in(rng, step), *row)
    return jax.vmap(one)(rng_B, z_BxW, chain.shape_logits(scores_BxWxV), alpha_t_BxW, alpha_s_BxW)
