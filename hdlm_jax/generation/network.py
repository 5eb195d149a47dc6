"""One pass of the network in a generation: over all rows, or over the window beside the cache of settled rows.

Letters as in generation/loop.py.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import phases, visibility
from hdlm_jax.generation.chain import Chain, lone_row, origins, trailing_row
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models import layouts
from hdlm_jax.models.attention import KV, dense
from hdlm_jax.models.attention import cached as cached_attention
from hdlm_jax.models.rotary import rotary_rows
from hdlm_jax.models.transformer import forward, forward_to_few, logits, rows_at

Hidden = Array | tuple[Array, Array]  # [B, K, D] rows that leave the network; with guidance, a pair: see `scores`
Rows = Callable[[Array | None], Hidden]  # places in the window, int32 [B, K] (None: all of it) -> these rows


def recomputed_phase(chain: Chain, given_BxL: Array, step: Array) -> phases.Phase:
    """The phase of `step` [B, L], in which what is given is clean and rests."""
    origin_B = origins(chain, given_BxL)
    step_B = jnp.broadcast_to(step, origin_B.shape)
    phase = phases.at_step(step_B, origin_B, given_BxL.shape[1], chain.hs, chain.schedule, chain.process.alpha_max)
    alphas = (jnp.where(given_BxL, 1.0, alpha) for alpha in (phase.alpha_t, phase.alpha_s))
    moves = jnp.where(given_BxL, 0.0, phase.steps)
    return phase._replace(**dict(zip(("alpha_t", "alpha_s"), alphas, strict=True)), steps=moves)


def recomputed_rows(chain: Chain, params: dict, x_BxL: Array, given_BxL: Array, phase: phases.Phase) -> Rows:
    """The rows of texts; their scores are meaningful at active positions."""
    if not chain.guidance:
        return partial(rows_at, all_rows(chain, params, x_BxL, phase))
    masked_BxL = jnp.where(given_BxL, chain.process.mask, x_BxL)
    noise = phase._replace(alpha_t=jnp.where(given_BxL, chain.alpha(chain.hs.tau_max), phase.alpha_t))
    both = jax.tree.map(lambda *x: jnp.concatenate(x), phase, noise)
    pair = jnp.split(all_rows(chain, params, jnp.concatenate([x_BxL, masked_BxL]), both), 2)
    return lambda place_BxK: tuple(rows_at(hidden, place_BxK) for hidden in pair)


def scores(chain: Chain, params: dict, hidden: Hidden) -> Array:
    """Scores [B, R, V] of rows; of a pair, those guided by what is given."""
    if not chain.guidance:
        return logits(chain.config, params, hidden)
    with_BxRxV, without_BxRxV = (logits(chain.config, params, rows) for rows in hidden)
    return guided(with_BxRxV, without_BxRxV, chain.guidance, chain.process.num_tokens)


def guided(with_BxLxV: Array, without_BxLxV: Array, guidance: float, num_tokens: int) -> Array:
    """Classifier-free guidance: without + (1 + w) (with - without), of scores with and without the given tokens.

    >>> guided(jnp.array([2.0, 1.0, -jnp.inf]), jnp.array([1.0, 1.0, -jnp.inf]), guidance=1.0, num_tokens=2).tolist()
    [3.0, 1.0, -inf]
    """
    with_N, without_N = with_BxLxV[..., :num_tokens], without_BxLxV[..., :num_tokens]
    scores = without_N + (1 + guidance) * (with_N - without_N)
    return jnp.concatenate([scores, with_BxLxV[..., num_tokens:]], -1)


def all_rows(chain: Chain, params: dict, x_BxL: Array, phase: phases.Phase) -> Array:
    """The rows [B, L, D] of all positions of texts at a phase."""
    rows = layouts.plain(chain.config, x_BxL, phase, trailing_row(chain))
    hidden, _ = forward(
        chain.config, params, rows.tokens, rows.positions, rows.attention, sigma_BxR=chain.sigma(rows.alpha)
    )
    first, end = rows.predicting
    return hidden[:, first:end]


def window_rows(
    chain: Chain,
    params: dict,
    cache: kv_cache.Cache,
    x_BxL: Array,
    given_BxL: Array,
    step: Array,
    settling: int,
) -> tuple[Rows, tuple[tuple[KV, ...], Array]]:
    """Feeds `settling` rows before the window and the window; returns its rows, and what enters the cache.

    What enters are the keys and values of settling rows, per block, and their slots [B, C]. Row layout: C settling
    rows, W window rows, one trailing row where it matters. Rows before position 0, past the text or past the window
    see only themselves.
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
    held_BxR, position_BxR = held(x_BxL), layouts.row_positions(config, row_BxR)
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
    window = slice(settling, settling + W)
    rows, new = forward_to_few(
        config,
        params,
        held_BxR,
        position_BxR,
        cached_attention(past, visible),
        window,
        lambda place_BxK: cached_attention(past, rows_at(visible[:, window], place_BxK)),
        sigma_BxR=chain.sigma(alpha_BxR),
        rotary=rotary_rows(config, params, x_BxL.shape[1], position_BxR),
        past=cache,
    )
    entering = 1 if lone_row(chain) else settling
    return rows, (jax.tree.map(lambda x: x[:, :, :entering], new), row_BxR[:, :entering])


def prefill(chain: Chain, params: dict, cache: kv_cache.Cache, x_BxL: Array, longest_prompt: int) -> kv_cache.Cache:
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
