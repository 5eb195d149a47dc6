"""Speed of generation, against the same network without a cache and against quenched autoregression."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hdlm_jax.benchmarks.timing import seconds, timed
from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.generation import loop, sampling, segments
from hdlm_jax.generation.chain import Chain, settling_rows, trailing_row
from hdlm_jax.generation.state import State
from hdlm_jax.models import attention, cache, transformer
from hdlm_jax.models import parts as builders

RECOMPUTED_STEPS = 2  # of the loop without a cache are timed, which leaves no call out: each costs the same


def measure(
    config: ConfigDict, num_tokens: int, hs: Hyperschedule, batch: int, repeats: int, alone: bool = False
) -> dict:
    """Times generation of `batch` texts of hs.length tokens with random weights; `alone`, without its baselines.

    Returns:
      tokens/s, steps of the hyperschedule and the model calls that they took, milliseconds and rows per call, cache
      bytes, the share of a call spent in attention over the cache (that attention alone, timed at the mean filling),
      and the speed relative to recomputing and scoring all rows at every step, and to quenched generation with the
      same network.
    """
    parts, params = _network(config, num_tokens)
    chain = sampling.chain(parts, hs, config.sampler)
    texts, kept = batch * hs.length, chain.cache_dtype or parts.model.activations(params["embedding"].dtype)
    full = parts.model.visibility == "full"
    time, state = timed(_generation(chain, params, batch, hs.num_steps, full), repeats)
    calls = int(state.calls)
    row = {
        "hyperschedule": hs.kind,
        "L": hs.length,
        "batch": batch,
        "width": hs.width,
        "rate": str(hs.rate),
        "steps": hs.num_steps,
        "calls": calls,
        "tokens/s": texts / time,
        "ms/call": 1e3 * time / calls,
    }
    if not alone:
        plain = chain._replace(rule=chain.rule._replace(chance=None, draw=None))
        step = seconds(_generation(plain, params, batch, RECOMPUTED_STEPS, True), repeats) / RECOMPUTED_STEPS
        row |= {"ms/call without cache": 1e3 * step, "x without cache": step * hs.num_steps / time}
    if full:
        return row | {"rows/call": hs.length}
    rows = hs.width + trailing_row(chain) + settling_rows(chain) / (hs.tau_max if hs.kind == "block" else 1)
    mean_slots = (min(hs.length, segments.granularity(hs.length)) + hs.length) // 2
    attending = seconds(_cache_attention(parts.model, batch, round(rows), mean_slots), repeats)
    row |= {
        "rows/call": rows,
        "cache bytes": cache.num_bytes(parts.model, batch, hs.length, kept),
        "cache attention": attending / (time / calls),
    }
    if alone:
        return row
    ar = sampling.chain(parts, hyperschedules.quenched(hs.length), config.sampler)
    return row | {"x quenched": seconds(_generation(ar, params, batch, hs.length, False), repeats) / time}


def _network(config: ConfigDict, num_tokens: int) -> tuple[builders.Parts, dict]:
    parts = builders.build(config, num_tokens, bos_id=num_tokens - 1)
    params = transformer.init(parts.model, jax.random.key(0))
    scale = parts.model.hidden**-0.5
    params["head_kernel"] = scale * jax.random.normal(jax.random.key(1), params["head_kernel"].shape)
    return parts, params


def _generation(chain: Chain, params: dict, batch: int, steps: int, recomputed: bool) -> Callable[[], State]:
    length = chain.hs.length
    rng_B = jax.random.split(jax.random.key(2), batch)
    x_BxL = jnp.full((batch, length), chain.process.mask, jnp.int32)
    given_BxL = jnp.zeros((batch, length), bool)
    run = functools.partial(_recomputed, chain, steps) if recomputed else functools.partial(_cached, chain)
    run = jax.jit(run)
    return lambda: run(params, rng_B, x_BxL, given_BxL)


def _cached(chain, params, rng_B, x_BxL, given_BxL) -> State:
    return loop.cached(chain, params, rng_B, x_BxL, given_BxL, longest_prompt=0)


def _recomputed(chain, steps, params, rng_B, x_BxL, given_BxL) -> State:
    return loop.recomputed(chain, params, rng_B, x_BxL, given_BxL, steps=steps)


def _cache_attention(model: transformer.TransformerConfig, batch: int, rows: int, slots: int):
    """All blocks' attention of one call over `slots` cache slots."""
    shape = lambda count: (model.blocks, batch, model.heads, count, model.head_size)
    values = np.random.default_rng(0).standard_normal(shape(slots), np.float32)
    q_blocks = jnp.asarray(values[:, :, :, :1]) * jnp.ones(shape(rows))
    past = tuple(attention.KV(jnp.swapaxes(kv, 2, 3), kv) for kv in jnp.asarray(values))
    attend = attention.cached(jnp.ones((1, rows, slots), bool), jnp.ones((1, rows, rows), bool))
    run = jax.jit(lambda q_blocks, past: [attend(q, q, q, kv, None) for q, kv in zip(q_blocks, past, strict=True)])
    return lambda: run(q_blocks, past)
