"""What generation carries from call to call, and the record that it may keep of its way.

Letters as in generation/loop.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.generation.chain import Chain


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


def recorded(chain: Chain, frames: int, step: Array, state: State) -> State:
    """The state with its frame of this step; the last call of a stride is what stays."""
    if not frames:
        return state
    index = step // _stride(chain.hs.num_steps, frames) + 1
    new = Frames(state.x, state.confidence)
    return state._replace(frames=jax.tree.map(lambda kept, y: kept.at[index].set(y), state.frames, new))


def _stride(num_steps: int, frames: int) -> int:
    return max(1, -(-num_steps // frames))
