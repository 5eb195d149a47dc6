"""From prompts to texts: the chain of a run's settings, and its draws."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.diffusion import scores, visibility
from hdlm_jax.diffusion.categorical import filter_logits
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.errors import UserError, one_of, require
from hdlm_jax.generation import loop
from hdlm_jax.models.parts import Parts, build_reverse


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      texts: one per sample, without the prompt's tokens removed.
      tokens: int32 [samples, L].
      trajectory: int32 [T, samples, L] tokens after every step, or None.
      hyperschedule: the one used.
    """

    texts: list[str]
    tokens: np.ndarray
    trajectory: np.ndarray | None
    hyperschedule: Hyperschedule


def chain(parts: Parts, hs: Hyperschedule, sampler: ConfigDict) -> loop.Chain:
    """The chain that generates under `hs` with the settings of a `sampler` block.

    Equal settings give the same object, and so the same compiled program.

    Raises:
      UserError: a hyperschedule that this model cannot sample exactly, or with given positions; an unknown
        sampler, a dial out of range, corrections by a network that was not trained to make them.
    """
    visibility.check_sampling(parts.model.visibility, parts.hs.width, hs)
    if parts.model.visibility == "prefix" and not parts.model.inexact_context:
        visibility.check_context(hs, parts.model.context_group)
    given = int((hs.starts < 0).sum())
    require(given == 0, "hyperschedule", f"{given} given positions", "none: what is given comes as the prompt's text")
    return _chain(parts, hs, tuple(sorted(sampler.items())))


def draw(
    chain: loop.Chain,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    length: int,
    seed: int = 0,
    record: bool = False,
) -> Generation:
    """One text of `length` tokens for each prompt.

    Raises:
      UserError: no prompt at all, or one that leaves no room.
    """
    require(len(prompts) > 0, "prompt", prompts, "at least one text")
    x_BxL = np.zeros((len(prompts), length), np.int32)
    prompt_B = np.zeros(len(prompts), np.int32)
    for i, text in enumerate(prompts):
        ids = tokenizer.encode(text) if text else x_BxL[i, :0]
        require(len(ids) < length, "prompt", f"{len(ids)} tokens", f"fewer than the text's {length} tokens")
        x_BxL[i, : len(ids)], prompt_B[i] = ids, len(ids)
    given_BxL = np.arange(length)[None, :] < prompt_B[:, None]
    tokens, history = complete(chain, params, x_BxL, given_BxL, int(prompt_B.max()), seed, record)
    tokens = np.asarray(tokens)
    texts = [tokenizer.decode(row, end_of_text="\n") for row in tokens]
    return Generation(texts, tokens, None if history is None else np.asarray(history), chain.hs)


def complete(
    chain: loop.Chain,
    params: dict,
    x_BxL: Array,
    given_BxL: Array,
    longest_prompt: int,
    seed: int | Array,
    record: bool = False,
) -> tuple[Array, Array | None]:
    """Draws what is not given, from the prior's noise to finished tokens; pure, and so exported as a program.

    Args:
      x_BxL: int32; what is given, elsewhere anything.
      given_BxL: bool; the tokens that stay.
      longest_prompt: static upper bound of the given tokens at the front.
      seed: 0 .. 2^32 - 1, of all draws.
      record: also return the tokens after every step.

    Returns:
      finished tokens [B, L], and [T, B, L] or None.
    """
    prior_rng, rng = jax.random.split(jax.random.key(seed))
    noise = chain.process.prior(prior_rng, x_BxL.shape, chain.alpha(jnp.asarray(chain.hs.tau_max)))
    x_BxL = jnp.where(given_BxL, x_BxL, noise).astype(jnp.int32)
    rng_B = jax.random.split(rng, x_BxL.shape[0])
    return _run(chain, longest_prompt, record, params, rng_B, x_BxL, jnp.asarray(given_BxL))


@functools.lru_cache(maxsize=64)
def _chain(parts: Parts, hs: Hyperschedule, sampler: tuple) -> loop.Chain:
    s = ConfigDict(dict(sampler))
    corrects = s.kind in ("acs", "acs_published") and s.eta > 0
    if corrects and parts.loss.name in ("epsilon_nelbo", "nelbo") and not s.untrained_correction:
        raise UserError(
            f"sampler.eta: got {s.eta} for a run trained on {parts.loss.name}, which shows the network tokens only at"
            " 0+; allowed: 0, or sampler.untrained_correction=true"
        )
    if parts.loss.reading in scores.READINGS:
        for name, off in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)):
            allowed = f"{off}: this network learned scores, which are rates and no probabilities of tokens"
            require(s[name] == off, f"sampler.{name}", s[name], allowed)
    reverse = build_reverse(s, parts.process, parts.loss.reading)
    one_of("sampler.cache_dtype", s.cache_dtype, ("", "float32", "bfloat16"))
    shape = functools.partial(filter_logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
    return loop.Chain(parts.model, hs, parts.schedule, parts.process, reverse, shape, s.cache_dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(chain: loop.Chain, longest_prompt: int, record: bool, params, rng_B, x_BxL, given_BxL):
    if chain.config.visibility == "full" or chain.config.inexact_context:  # settled rows may change: nothing to cache
        return loop.recomputed(chain, params, rng_B, x_BxL, given_BxL, record)
    return loop.cached(chain, params, rng_B, x_BxL, given_BxL, longest_prompt, record)
