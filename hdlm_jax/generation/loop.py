"""Generation as a `lax.scan` over the steps of a hyperschedule; nothing returns to the host inside.

Two loops draw from the same chain. `recomputed` feeds all rows at every step: the loop of `full`
models, and the slow twin of `cached`. `cached` feeds only the rows settled by the last call and the
window: the loop of `prefix` models, at a cost per token that does not grow with the text.

What is given stays: the tokens marked in given_BxL. The hyperschedule starts at each text's origin, the end of its
prompt (`chain.origins`); given tokens behind it are clean rows of the window that no step changes.

Letters: B texts, L positions, W window rows, C settling rows fed with a window, S cache slots, T steps, F frames.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion.rules import Move, probability
from hdlm_jax.generation.chain import Chain, origins, settling_rows
from hdlm_jax.generation.network import prefill, recomputed_logits, window_logits
from hdlm_jax.generation.segments import plan, settles_at_once
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models.transformer import unstacked


class Frames(NamedTuple):
    """The record of a generation: tokens int32 [F, B, L] and the network's confidence in them float32 [F, B, L]."""

    tokens: Array
    confidence: Array


class State(NamedTuple):
    """What generation carries from call to call.

    Attributes:
      x: int32 [B, L], the texts.
      calls: int32, how often the network was called.
      memory: float32 [B, L], what the rule remembers; None for rules without memory.
      confidence: float32 [B, L], see `generation.trajectory`; None where nothing is recorded.
      frames: the record; None where nothing is recorded.
    """

    x: Array
    calls: Array
    memory: Array | None = None
    confidence: Array | None = None
    frames: Frames | None = None


def begin(chain: Chain, x_BxL: Array, given_BxL: Array, frames: int = 0) -> State:
    """The state before the first call: what is given, and noise of the prior.

    Args:
      frames: kept at most, besides the first; 0 records nothing.
    """
    state = State(x_BxL, jnp.int32(0))
    if chain.rule.memory is not None:
        state = state._replace(memory=jnp.full(x_BxL.shape, chain.rule.memory, jnp.float32))
    if not frames:
        return state
    unknown = jnp.full(x_BxL.shape, jnp.nan, jnp.float32)
    spread = lambda y_BxL: jnp.broadcast_to(y_BxL, (len(frame_steps(chain, frames)), *y_BxL.shape))
    return state._replace(confidence=unknown, frames=Frames(spread(x_BxL), spread(unknown)))


def frame_steps(chain: Chain, frames: int) -> list[int]:
    """The generation step after which each frame is taken: 0, then evenly on, then T."""
    T = chain.hs.num_steps
    return [*range(0, T, _stride(T, frames)), T]


def _stride(num_steps: int, frames: int) -> int:
    return max(1, -(-num_steps // frames))


def recomputed(
    chain: Chain,
    params: dict,
    rng_B: Array,
    x_BxL: Array,
    given_BxL: Array,
    frames: int = 0,
    steps: int | None = None,
) -> State:
    """Generates by feeding all rows at every step.

    Args:
      chain: the chain.
      params: network parameters.
      rng_B: one PRNG key per text: a text does not depend on the batch it is in.
      x_BxL: int32; what is given, and noise of the prior.
      given_BxL: bool; the tokens that stay.
      frames: kept at most, besides the first; 0 records nothing.
      steps: stop after so many (default: all).

    Returns:
      the state after the last step: finished texts, and their frames.
    """
    state = begin(chain, x_BxL, given_BxL, frames)
    steps = jnp.arange(chain.hs.num_steps if steps is None else steps)
    return advance_recomputed(chain, params, rng_B, given_BxL, frames, state, steps)


def advance_recomputed(
    chain: Chain, params: dict, rng_B: Array, given_BxL: Array, frames: int, state: State, steps: Array
) -> State:
    """`recomputed` from one state on, over successive steps."""

    def call(state: State, step: Array) -> State:
        phase, scores = recomputed_logits(chain, params, state.x, given_BxL, step)
        index_BxL = jnp.broadcast_to(jnp.arange(state.x.shape[1])[None, :], state.x.shape)
        move = Move(phase.alpha_t, phase.alpha_s, phase.steps > 0)
        return _moved(chain, rng_B, step, state, scores, index_BxL, move)

    idle = _idle(chain, given_BxL, chain.rule.skips)

    def body(state: State, step: Array):
        return _recorded(chain, frames, step, _unless(idle, state, call, state, step)), None

    return jax.lax.scan(body, state, steps)[0]


def cached(
    chain: Chain,
    params: dict,
    rng_B: Array,
    x_BxL: Array,
    given_BxL: Array,
    longest_prompt: int,
    frames: int = 0,
) -> State:
    """Generates with the exact cache; arguments and results as `recomputed`.

    Args:
      longest_prompt: static upper bound of the origins.
    """
    segments = plan(chain.hs, x_BxL.shape[1], longest_prompt)
    state = begin(chain, x_BxL, given_BxL, frames)
    cache = begin_cache(chain, params, x_BxL, longest_prompt, segments[0].slots)
    for segment in segments:
        steps = jnp.arange(segment.first, segment.end)
        carry = (state, kv_cache.grow(cache, segment.slots))
        state, cache = advance_cached(chain, params, rng_B, given_BxL, frames, carry, steps)
    return state


def begin_cache(chain: Chain, params: dict, x_BxL: Array, longest_prompt: int, slots: int) -> kv_cache.Cache:
    """A cache that holds the prompts, with room for `slots` rows at least."""
    dtype = chain.cache_dtype or (params["embedding"].dtype if chain.config.dtype == "float32" else chain.config.dtype)
    cache = kv_cache.empty(chain.config, x_BxL.shape[0], slots, dtype)
    if not longest_prompt:
        return cache
    return prefill(chain, unstacked(chain.config, params), cache, x_BxL, longest_prompt)


def advance_cached(
    chain: Chain,
    params: dict,
    rng_B: Array,
    given_BxL: Array,
    frames: int,
    carry: tuple[State, kv_cache.Cache],
    steps: Array,
    nested: bool = True,
) -> tuple[State, kv_cache.Cache]:
    """`cached` from one state and cache on, over successive steps.

    Args:
      nested: where windows stand still for tau_max calls, only the first of them feeds settled rows; `steps` then
        begin with such a call and end before another.
    """
    params = unstacked(chain.config, params)

    def call(settling: int, carry, step: Array):
        state, cache = carry
        scores, cache = window_logits(chain, params, cache, state.x, given_BxL, step, settling)
        index_BxW, move = _window_move(chain, given_BxL, step)
        return _moved(chain, rng_B, step, state, scores, index_BxW, move), cache

    finished = _idle(chain, given_BxL, skips=False)

    def settle(carry, step: Array):
        """A call whose first rows enter the cache, so that it must not be left out while a text goes on."""
        enter = functools.partial(call, settling_rows(chain))
        state, cache = _unless(finished, carry[0], enter, carry, step)
        return (_recorded(chain, frames, step, state), cache), None

    P = chain.hs.tau_max
    if not (nested and settles_at_once(chain.hs)):
        return jax.lax.scan(settle, carry, steps)[0]

    idle = _idle(chain, given_BxL, chain.rule.skips)

    def block(carry, steps_P: Array):
        (state, cache), _ = settle(carry, steps_P[0])

        def later(state: State, step: Array):  # the cache rests: carried along, XLA would copy it
            once = lambda state, step: call(0, (state, cache), step)[0]
            return _recorded(chain, frames, step, _unless(idle, state, once, state, step)), None

        return (jax.lax.scan(later, state, steps_P[1:])[0], cache), None

    return jax.lax.scan(block, carry, steps.reshape(-1, P))[0]


def _window_move(chain: Chain, given_BxL: Array, step: Array) -> tuple[Array, Move]:
    """Positions of the window's rows [B, W] (those past the text are L or more), and how this call moves them."""
    start, stop = chain.hs.window(step)
    relative_W = start + jnp.arange(chain.hs.width)
    level_W, next_W = chain.hs.level_of(relative_W, step), chain.hs.level_of(relative_W, step + 1)
    index_BxW = origins(chain, given_BxL)[:, None] + relative_W[None, :]
    given_BxW = _at(given_BxL, index_BxW)
    inside_BxW = (index_BxW < given_BxL.shape[1]) & (relative_W < stop)[None, :]
    alpha_t = jnp.where(given_BxW, 1.0, chain.alpha(level_W)[None])
    alpha_s = jnp.where(inside_BxW & ~given_BxW, chain.alpha(next_W)[None], alpha_t)
    return index_BxW, Move(alpha_t, alpha_s, inside_BxW & ~given_BxW & (next_W < level_W)[None])


def _moved(
    chain: Chain, rng_B: Array, step: Array, state: State, scores_BxWxV: Array, index_BxW: Array, move: Move
) -> State:
    """One call's move, with a key per text, so that a text is the same alone and in any batch."""
    shaped_BxWxV = chain.shape_logits(scores_BxWxV, state.x)
    one = lambda rng, *row: chain.rule.step(jax.random.fold_in(rng, step), *row)
    memory_BxW = None if state.memory is None else _at(state.memory, index_BxW)
    z_BxW, memory_BxW = jax.vmap(one)(rng_B, _at(state.x, index_BxW), shaped_BxWxV, move, memory_BxW, scores_BxWxV)
    put = functools.partial(_put, index_BxW=jnp.where(move.changes, index_BxW, state.x.shape[1]))
    state = state._replace(x=put(state.x, z_BxW), calls=state.calls + 1)
    if memory_BxW is not None:
        state = state._replace(memory=put(state.memory, memory_BxW))
    if state.confidence is not None:
        state = state._replace(confidence=put(state.confidence, _confidence(chain, scores_BxWxV, z_BxW)))
    return state


def _at(y_BxL: Array, index_BxW: Array) -> Array:
    return jnp.take_along_axis(y_BxL, index_BxW, 1, mode="clip")


def _put(y_BxL: Array, new_BxW: Array, index_BxW: Array) -> Array:
    """`y` with new values at some positions; those at L or more are dropped."""
    return y_BxL.at[jnp.arange(y_BxL.shape[0])[:, None], index_BxW].set(new_BxW.astype(y_BxL.dtype), mode="drop")


def _confidence(chain: Chain, scores_BxWxV: Array, z_BxW: Array) -> Array:
    """The network's probability of the tokens, of the likeliest one at masks."""
    N = chain.process.num_tokens
    best_BxW = jnp.argmax(scores_BxWxV[..., :N], -1)
    return probability(scores_BxWxV, jnp.where(z_BxW == chain.process.mask, best_BxW, z_BxW), N)


def _recorded(chain: Chain, frames: int, step: Array, state: State) -> State:
    """The state with its frame of this step; the last call of a stride is what stays."""
    if not frames:
        return state
    index = step // _stride(chain.hs.num_steps, frames) + 1
    new = Frames(state.x, state.confidence)
    return state._replace(frames=jax.tree.map(lambda kept, y: kept.at[index].set(y), state.frames, new))


# ---- calls that can be left out


def _unless(idle: Callable | None, state: State, call: Callable, carry: Any, step: Array) -> Any:
    """The carry after a call; as it was where that would have nothing to do."""
    if idle is None:
        return call(carry, step)
    return jax.lax.cond(idle(state, step), lambda carry, step: carry, call, carry, step)


def _idle(chain: Chain, given_BxL: Array, skips: bool) -> Callable[[State, Array], Array] | None:
    """(state, step) -> whether the call has nothing to do; None where every call has.

    All texts hold a settled end, or, with `skips`, the rule fills masks only and finds none that may change.
    """
    if chain.end is None and not skips:
        return None

    def level_BxL(step: Array) -> Array:
        relative_BxL = jnp.arange(given_BxL.shape[1])[None, :] - origins(chain, given_BxL)[:, None]
        return jnp.where(given_BxL, 0, chain.hs.level_of(relative_BxL, step))

    def idle(state: State, step: Array) -> Array:
        now_BxL, nothing = level_BxL(step), jnp.bool_(False)
        if chain.end is not None:
            nothing |= ((now_BxL == 0) & ~given_BxL & (state.x == chain.end)).any(1).all()
        if skips:
            nothing |= ~((state.x == chain.process.mask) & (level_BxL(step + 1) < now_BxL)).any()
        return nothing

    return idle
