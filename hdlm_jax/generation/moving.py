"""One call's move of its window: what is known before the network is asked, which rows are scored, what is drawn.

Where a rule takes from chance which positions draw a token (`Rule.chance`), a call in which none does is left out, and
in the others only the rows that draw leave the network: the head of a large vocabulary is much of a call. The texts
are the same, up to the rounding of scores.

Letters as in generation/loop.py; K rows of each text leave the network.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion.reverse import Chance
from hdlm_jax.diffusion.rules import Move, probability
from hdlm_jax.generation.chain import Chain, origins
from hdlm_jax.generation.network import Rows, scores
from hdlm_jax.generation.state import State
from hdlm_jax.models.transformer import rows_at

SMALL_VOCABULARY = 1024  # of so many tokens the head costs less than choosing its rows


class Turn(NamedTuple):
    """What a call will do, as far as it is known before the network is asked.

    Attributes:
      rng_B: one PRNG key per text, of this call.
      index_BxW: int32, positions of the window's rows; those past the text are L or more.
      move: of these rows, [B, W] each.
      chance: of these rows, [B, W] each; None where the rule draws later.
    """

    rng_B: Array
    index_BxW: Array
    move: Move
    chance: Chance | None


def turn(chain: Chain, rng_B: Array, step: Array, x_BxL: Array, index_BxW: Array, move: Move) -> Turn:
    """The turn of a step, with a key per text, so that a text is the same alone and in any batch."""
    rng_B = jax.vmap(jax.random.fold_in, (0, None))(rng_B, step)
    draw = chain.rule.chance
    chance = None if draw is None else jax.vmap(draw)(rng_B, _at(x_BxL, index_BxW), move)
    return Turn(rng_B, index_BxW, move, chance)


def window_turn(chain: Chain, rng_B: Array, step: Array, x_BxL: Array, given_BxL: Array) -> Turn:
    """The turn of the hyperschedule's window of a step."""
    start, stop = chain.hs.window(step)
    relative_W = start + jnp.arange(chain.hs.width)
    level_W, next_W = chain.hs.level_of(relative_W, step), chain.hs.level_of(relative_W, step + 1)
    index_BxW = origins(chain, given_BxL)[:, None] + relative_W[None, :]
    given_BxW = _at(given_BxL, index_BxW)
    inside_BxW = (index_BxW < given_BxL.shape[1]) & (relative_W < stop)[None, :]
    alpha_t = jnp.where(given_BxW, 1.0, chain.alpha(level_W)[None])
    alpha_s = jnp.where(inside_BxW & ~given_BxW, chain.alpha(next_W)[None], alpha_t)
    move = Move(alpha_t, alpha_s, inside_BxW & ~given_BxW & (next_W < level_W)[None])
    return turn(chain, rng_B, step, x_BxL, index_BxW, move)


def moved(chain: Chain, params: dict, turn: Turn, state: State, rows: Rows) -> State:
    """The state after a call whose window leaves the network as `rows`."""
    state = state._replace(calls=state.calls + 1)
    if chain.rule.draw is None or state.confidence is not None:
        return _together(chain, params, turn, state, rows)
    counts = row_counts(chain, turn.index_BxW.shape[1])
    alone = [functools.partial(_alone, chain, params, rows, count) for count in counts]
    fits = jnp.searchsorted(jnp.array(counts), turn.chance.draws.sum(1).max())
    return state._replace(x=jax.lax.switch(fits, alone, turn, state.x))


def row_counts(chain: Chain, width: int) -> tuple[int, ...]:
    """How many rows of each text may leave the network in a call: of these the fewest that hold all that draw."""
    if chain.every_row or chain.config.num_tokens <= SMALL_VOCABULARY:
        return (width,)
    few = 1 << max(0, math.ceil(math.log2(2 * chain.hs.rate)))  # a call settles `rate` tokens, and draws some more
    more = (2 * few * 4**i for i in itertools.count())
    return (*itertools.takewhile(lambda count: count < width, itertools.chain([few], more)), width)


def _alone(chain: Chain, params: dict, rows: Rows, count: int, turn: Turn, x_BxL: Array) -> Array:
    """The texts after the rows that draw have moved, each on its own; `count` of each text hold them all."""
    L, W = x_BxL.shape[1], turn.index_BxW.shape[1]
    place_BxK = None
    if count < W:  # filled up with the last row, which is dropped or drawn alike
        place_BxK = jax.vmap(lambda draws_W: jnp.nonzero(draws_W, size=count, fill_value=W - 1)[0])(turn.chance.draws)
    drawn = (jnp.where(turn.chance.draws, turn.index_BxW, L), turn.move, turn.chance)
    index_BxK, move, chance = jax.tree.map(lambda y: rows_at(y, place_BxK), drawn)
    logits_BxKxV = chain.shape_logits(scores(chain, params, rows(place_BxK)), x_BxL)
    z_BxK = jax.vmap(chain.rule.draw)(chance, _at(x_BxL, index_BxK), logits_BxKxV, move)
    return _put(x_BxL, z_BxK, index_BxK)


def _together(chain: Chain, params: dict, turn: Turn, state: State, rows: Rows) -> State:
    """The state after all rows of the windows have moved, whose positions may depend on each other."""
    index_BxW, move = turn.index_BxW, turn.move
    scores_BxWxV = scores(chain, params, rows(None))
    shaped_BxWxV = chain.shape_logits(scores_BxWxV, state.x)
    memory_BxW = None if state.memory is None else _at(state.memory, index_BxW)
    columns = (_at(state.x, index_BxW), shaped_BxWxV, move, memory_BxW, scores_BxWxV)
    z_BxW, memory_BxW = jax.vmap(chain.rule.step)(turn.rng_B, *columns)
    put = functools.partial(_put, index_BxW=jnp.where(move.changes, index_BxW, state.x.shape[1]))
    state = state._replace(x=put(state.x, z_BxW))
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


# ---- calls that can be left out


def idle(chain: Chain, turn: Turn, state: State) -> Array | None:
    """Whether a call would change nothing, a scalar; None where every call may.

    With a record all calls are made of rules that move every position on its own: it holds what the network thinks.
    """
    if turn.chance is None or (chain.rule.draw is not None and state.confidence is not None):
        return None
    return ~turn.chance.draws.any()


def finished(chain: Chain, step: Array, x_BxL: Array, given_BxL: Array) -> Array | None:
    """Whether all texts hold a settled end, a scalar; None where texts have no end."""
    if chain.end is None:
        return None
    relative_BxL = jnp.arange(x_BxL.shape[1])[None, :] - origins(chain, given_BxL)[:, None]
    settled_BxL = ~given_BxL & (chain.hs.level_of(relative_BxL, step) == 0)
    return (settled_BxL & (x_BxL == chain.end)).any(1).all()
