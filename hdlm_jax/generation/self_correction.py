"""Self-correction of finished texts (GIDD, von Rütte et al. 2025, arXiv 2503.04482): one token at a time.

A network that has seen texts with wrong tokens is asked for every token of a finished one, at a small noise level; of
the drawn tokens that differ from the text's, the one with the largest probability takes its place. This is repeated
until the self-accuracy, the share of tokens that are the network's likeliest, has stalled.

Letters: B texts, L positions, N ordinary tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.diffusion import phases, samplers, scores
from hdlm_jax.diffusion.categorical import categorical, with_temperature
from hdlm_jax.diffusion.fields import number, whole
from hdlm_jax.diffusion.hyperschedules import flat
from hdlm_jax.diffusion.rules import probability
from hdlm_jax.errors import UserError, require
from hdlm_jax.generation.chain import Chain
from hdlm_jax.generation.network import all_rows
from hdlm_jax.generation.sampling import keys
from hdlm_jax.models.parts import Parts
from hdlm_jax.models.transformer import logits


class Corrected(NamedTuple):
    """What `correct` returns, for each text.

    Attributes:
      tokens: int32 [B, L], the text of the best self-accuracy on the way.
      replaced: int32 [B], tokens in which it differs from the text that was given.
      accuracy: float32 [B, 2], self-accuracy before and after.
      calls: int32 [B], of the network.
    """

    tokens: Array
    replaced: Array
    accuracy: Array
    calls: Array


class Correction(NamedTuple):
    """What `of_text` returns.

    Attributes:
      texts: the corrected ones.
      tokens: int32 [B, L].
      replaced: int32 [B], tokens that are others than before.
      accuracy: float32 [B, 2], self-accuracy before and after.
      calls: int32 [B], of the network.
    """

    texts: list[str]
    tokens: np.ndarray
    replaced: np.ndarray
    accuracy: np.ndarray
    calls: np.ndarray


class _State(NamedTuple):
    x: Array
    best: Array
    accuracy: Array  # [B, 2], of the first text and of the best one
    stalled: Array  # [B], calls since the best one
    calls: Array  # [B]
    step: Array


def correct(
    chain: Chain,
    params: dict,
    x_BxL: Array,
    given_BxL: Array,
    rng_B: Array,
    temperature: float = 0.1,
    noise: float = 0.01,
    patience: int = 32,
    limit: int = 1024,
) -> Corrected:
    """Corrects finished texts; pure, and each text is corrected alike alone and in any batch.

    Args:
      chain: of the network; its hyperschedule and rule are not used.
      params: network parameters.
      x_BxL: int32, ordinary tokens.
      given_BxL: bool, the tokens that stay.
      rng_B: one PRNG key per text.
      temperature: of the tokens drawn, >= 0.
      noise: noise fraction in (0, 1) that a conditioned network is shown.
      patience: calls without a better self-accuracy after which a text is left alone.
      limit: most calls.

    Raises:
      UserError: a value out of range.
    """
    number("temperature", temperature, "a number >= 0 (0 is greedy)", lambda value: value >= 0)
    noise = number("noise", noise, "a number in (0, 1)", lambda value: 0 < value < 1)
    patience, limit = whole("patience", patience, 1), whole("limit", limit, 1)
    return _run(chain, temperature, noise, patience, limit, params, x_BxL, given_BxL, rng_B)


def of_text(
    parts: Parts,
    params: dict,
    tokenizer: Tokenizer,
    text: str | np.ndarray,
    seed: int | Sequence[int] = 0,
    **dials: Any,
) -> Correction:
    """Corrects a text, or finished tokens int32 [B, L].

    Args:
      parts, params, tokenizer: of the model.
      seed: of the draws, or one seed per text.
      **dials: temperature, noise, patience, limit of `correct`.

    Raises:
      UserError: a text that is empty or longer than the trained length; as `check` and `correct`.
    """
    check(parts)
    tokens_BxL = tokenizer.encode(text)[None] if isinstance(text, str) else np.asarray(text, np.int32)
    (batch, length), trained = tokens_BxL.shape, parts.model.length
    require(1 <= length <= trained, "text", f"{length} tokens", f"1 .. {trained} tokens, the trained length")
    rule = samplers.build("ancestral", parts.process, parts.loss.reading)
    chain = Chain(parts.model, flat(length, 1), parts.schedule, parts.process, rule)
    given_BxL = jnp.zeros(tokens_BxL.shape, bool)
    out = correct(chain, params, jnp.asarray(tokens_BxL), given_BxL, keys(seed, batch), **dials)
    tokens, *counts = map(np.asarray, out)
    return Correction([tokenizer.decode(row, end_of_text="\n") for row in tokens], tokens, *counts)


def check(parts: Parts) -> None:
    """Refuses models that say nothing of the tokens of a finished text.

    Raises:
      UserError: a `prefix` model, one that has never seen a wrong token, one that learned scores.
    """
    kind = parts.process.name
    full = "'full': a prefix model sees nothing behind a token (train with model.visibility 'full')"
    require(parts.model.visibility == "full", "model.visibility", parts.model.visibility, full)
    if parts.process.frozen and parts.process.epsilon == 0:
        raise UserError(
            f"noising.kind: got {kind!r}; allowed: 'gidd', 'epsilon_hybrid', 'gamma_hybrid', 'uniform' (a network that"
            " has seen no wrong tokens takes every token for right)"
        )
    if parts.loss.reading in scores.READINGS:
        raise UserError(f"loss.kind: got {parts.loss.name!r}; allowed: a loss of token probabilities, for corrections")


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(chain: Chain, temperature: float, noise: float, patience: int, limit: int, params, x_BxL, given_BxL, rng_B):
    N, B = chain.process.num_tokens, x_BxL.shape[0]
    phase = phases.at_zero_plus(x_BxL.shape, chain.schedule, chain.process.alpha_max)
    alpha = jnp.minimum(chain.schedule.alpha(jnp.full(x_BxL.shape, noise)), chain.process.alpha_max)
    phase = phase._replace(alpha_t=alpha)
    free_BxL = ~given_BxL

    def going(state: _State) -> Array:
        return (state.stalled < patience) & (state.accuracy[:, 1] < 1)

    def step(state: _State) -> _State:
        on_B = going(state)
        hidden_BxLxD = all_rows(chain, params, state.x, phase)
        logits_BxLxN = logits(chain.config, params, hidden_BxLxD)[..., :N].astype(jnp.float32)
        agrees_BxL = (jnp.argmax(logits_BxLxN, -1) == state.x) & free_BxL
        accuracy_B = agrees_BxL.sum(1) / jnp.maximum(free_BxL.sum(1), 1)
        better_B = on_B & (accuracy_B > state.accuracy[:, 1])
        warm_BxLxN = with_temperature(logits_BxLxN, temperature)
        draw = lambda rng, logits_LxN: categorical(jax.random.fold_in(rng, state.step), logits_LxN)
        drawn_BxL = jax.vmap(draw)(rng_B, warm_BxLxN).astype(state.x.dtype)
        sure_BxL = jnp.where((drawn_BxL != state.x) & free_BxL, probability(warm_BxLxN, drawn_BxL, N), -1.0)
        place_B, rows_B = jnp.argmax(sure_BxL, 1), jnp.arange(B)
        replace_B = on_B & (sure_BxL[rows_B, place_B] >= 0)
        chosen_B = jnp.where(replace_B, drawn_BxL[rows_B, place_B], state.x[rows_B, place_B])
        first_B = jnp.where(state.step == 0, accuracy_B, state.accuracy[:, 0])
        return _State(
            x=state.x.at[rows_B, place_B].set(chosen_B),
            best=jnp.where(better_B[:, None], state.x, state.best),
            accuracy=jnp.stack([first_B, jnp.where(better_B, accuracy_B, state.accuracy[:, 1])], 1),
            stalled=jnp.where(better_B, 0, state.stalled + 1),
            calls=state.calls + on_B,
            step=state.step + 1,
        )

    none_B = jnp.zeros(B, jnp.int32)
    start = _State(x_BxL, x_BxL, jnp.full((B, 2), -1.0), none_B, none_B, jnp.int32(0))
    end = jax.lax.while_loop(lambda state: going(state).any() & (state.step < limit), step, start)
    return Corrected(end.best, (end.best != x_BxL).sum(1).astype(jnp.int32), end.accuracy, end.calls)
