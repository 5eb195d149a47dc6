"""Generation as a `lax.scan` over the steps of a hyperschedule; nothing returns to the host inside.

Two loops draw from the same chain. `recomputed` feeds all rows at every step: the loop of `full`
models, and the slow twin of `cached`. `cached` feeds only the rows settled by the last call and the
window: the loop of `prefix` models, at a cost per token that does not grow with the text.

What is given stays: the tokens marked in given_BxL. The hyperschedule starts at each text's origin, the end of its
prompt (`chain.origins`); given tokens behind it are clean rows of the window that no step changes.

Letters: B texts, L positions, W window rows, C settling rows fed with a window, S cache slots, T steps, F frames.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion.rules import Move
from hdlm_jax.generation import moving
from hdlm_jax.generation.chain import Chain, settling_rows
from hdlm_jax.generation.network import prefill, recomputed_phase, recomputed_rows, window_rows
from hdlm_jax.generation.segments import plan, settles_at_once
from hdlm_jax.generation.state import State, begin, recorded
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models.transformer import unstacked

Carry = TypeVar("Carry")


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

    def body(state: State, step: Array):
        phase = recomputed_phase(chain, given_BxL, step)
        index_BxL = jnp.broadcast_to(jnp.arange(state.x.shape[1])[None, :], state.x.shape)
        move = Move(phase.alpha_t, phase.alpha_s, phase.steps > 0)
        turn = moving.turn(chain, rng_B, step, state.x, index_BxL, move)

        def call(state: State) -> State:
            rows = recomputed_rows(chain, params, state.x, given_BxL, phase)
            return moving.moved(chain, params, turn, state, rows)

        done = moving.finished(chain, step, state.x, given_BxL)
        state = _unless((done, moving.idle(chain, turn, state)), call, state)
        return recorded(chain, frames, step, state), None

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
    dtype = chain.cache_dtype or chain.config.activations(params["embedding"].dtype)
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

    def done(state: State, step: Array) -> Array | None:
        return moving.finished(chain, step, state.x, given_BxL)

    def settle(carry, step: Array):
        """A call whose first rows enter the cache, so that it must not be left out while a text goes on."""

        def call(carry):
            state, cache = carry
            turn = moving.window_turn(chain, rng_B, step, state.x, given_BxL)
            rows, settled = window_rows(chain, params, cache, state.x, given_BxL, step, settling_rows(chain))
            state = moving.moved(chain, params, turn, state, rows)
            return state, kv_cache.write(cache, *settled, after_B=state.x[:, 0])

        state, cache = _unless((done(carry[0], step),), call, carry)
        return (recorded(chain, frames, step, state), cache), None

    if not (nested and settles_at_once(chain.hs)):
        return jax.lax.scan(settle, carry, steps)[0]

    def block(carry, steps_P: Array):
        (state, cache), _ = settle(carry, steps_P[0])

        def later(state: State, step: Array):  # the cache rests: carried along, XLA would copy it
            turn = moving.window_turn(chain, rng_B, step, state.x, given_BxL)

            def call(state: State) -> State:
                rows, _ = window_rows(chain, params, cache, state.x, given_BxL, step, settling=0)
                return moving.moved(chain, params, turn, state, rows)

            state = _unless((done(state, step), moving.idle(chain, turn, state)), call, state)
            return recorded(chain, frames, step, state), None

        return (jax.lax.scan(later, state, steps_P[1:])[0], cache), None

    return jax.lax.scan(block, carry, steps.reshape(-1, chain.hs.tau_max))[0]


def _unless(reasons: tuple[Array | None, ...], call: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """The carry after a call; as it was where one of the reasons to leave it out holds, None being no reason."""
    reasons = [reason for reason in reasons if reason is not None]
    if not reasons:
        return call(carry)
    return jax.lax.cond(jnp.stack(reasons).any(), lambda carry: carry, call, carry)
