"""Small chains, random parameters and noised texts for the tests of generation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.diffusion import noise_schedules, noising, reverse
from hdlm_jax.diffusion.rules import Rule, positionwise
from hdlm_jax.generation import loop, network, sampling
from hdlm_jax.generation.chain import Chain, origins, settling_rows
from hdlm_jax.generation.shaping import Shaping, shaper
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models.transformer import TransformerConfig, init, unstacked

N, L = 6, 12
ORIGINS = (0, 3, 7)
EPSILON_HYBRID, ABSORB = noising.epsilon_hybrid(N, 0.2), noising.absorb(N)

# compilation is what these tests spend their time on
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
run_of_sampling = jit(sampling._run.__wrapped__, static_argnums=(0, 1, 2))


def chain_of(hs, prediction="aligned", *, conditioning=0, schedule=None, process=EPSILON_HYBRID, sampler=None, **model):
    """A small chain, by default of a prefix model sampled with corrections."""
    config = TransformerConfig(
        **{"hidden": 16, "blocks": 2, "heads": 2, "vocabulary_multiple": 8, "visibility": "prefix"} | model,
        num_tokens=process.num_tokens,
        length=hs.length,
        prediction=prediction,
        bos_id=process.num_tokens - 1,
        conditioning=conditioning,
        interpolation=0.3 if conditioning else 0.0,
    )
    sampler = sampler or reverse.acs(EPSILON_HYBRID, 0.5)
    rule = sampler if isinstance(sampler, Rule) else positionwise(sampler)
    return Chain(config, hs, schedule or noise_schedules.linear(), process, rule)


def greedy_absorb(hs, prediction, **model):
    """Nothing is left to chance where every step is its position's last."""
    chain = chain_of(hs, prediction, process=ABSORB, sampler=reverse.ancestral(ABSORB), **model)
    return chain._replace(shape_logits=shaper(Shaping(temperature=0.0), N))


def random_params(config, dtype=jnp.float32):
    """Parameters far from their start: no zero head, no zero modulation, no norm of ones."""
    rng = np.random.default_rng(3)

    def random(path, leaf):
        name = path[-1].key
        scale = 0.5 if "bias" in name else 1.5 / np.sqrt(leaf.shape[-2] if "kernel" in name else 1)
        return jnp.asarray(rng.normal(0, scale, leaf.shape), dtype)

    return jax.tree.map_with_path(random, jax.eval_shape(lambda: init(config, jax.random.key(0))))


def relative_positions(origins=ORIGINS):
    """[B, L], negative inside the prompts."""
    return np.arange(L)[None] - np.array(origins)[:, None]


def given(origins=ORIGINS):
    """The prompts' tokens, bool [B, L]."""
    return jnp.asarray(relative_positions(origins) < 0)


def levels_of_texts(hs, origins=ORIGINS):
    """Level of every position of every text at every step, [T + 1, B, L], from the table of levels."""
    relative_BxL = relative_positions(origins)
    return np.where(relative_BxL[None] < 0, 0, np.asarray(hs.levels)[:, np.maximum(relative_BxL, 0)])


def prior_texts(process, origins=ORIGINS):
    """What generation starts from: prompts of random tokens, then masks."""
    x_BxL = np.random.default_rng(0).integers(0, N, (len(origins), L))
    return jnp.asarray(np.where(relative_positions(origins) < 0, x_BxL, process.mask), jnp.int32)


def noised_texts(hs, origins=ORIGINS):
    """Tokens before every step [T, B, L]: settled ones fixed, the others drawn anew, masks and tokens alike."""
    rng, level_TxBxL = np.random.default_rng(0), levels_of_texts(hs, origins)[:-1]
    token_TxBxL = rng.integers(0, N, level_TxBxL.shape)
    noise_TxBxL = np.where(rng.random(level_TxBxL.shape) < 0.5, N, token_TxBxL)
    return jnp.asarray(np.where(level_TxBxL == 0, token_TxBxL[:1], noise_TxBxL), jnp.int32)


def keys(count, seed=3):
    return jax.random.split(jax.random.key(seed), count)


def generate(chain, params, origins=ORIGINS, rows=slice(None), cached=True, **options):
    """Finished tokens [B, L] and tokens after every step [T, B, L] of some rows of a batch of prompts."""
    state = generated(chain, params, origins, rows, cached, **options)
    return np.asarray(state.x), np.asarray(state.frames.tokens[1:])


def generated(chain, params, origins=ORIGINS, rows=slice(None), cached=True, **options):
    """The last state of a generation, by default with a frame after every call."""
    if cached:
        options["longest_prompt"] = max(origins[rows])
    options.setdefault("frames", chain.hs.num_steps)
    run = functools.partial(loop.cached if cached else loop.recomputed, chain, **options)
    inputs = (keys(len(origins)), prior_texts(chain.process, origins), given(origins))
    return jit(run)(params, *(x[rows] for x in inputs))


def recomputed_scores(chain, params, x_BxL, given_BxL, step):
    """The phase of a step, and the scores [B, L, V] of all rows."""
    phase = network.recomputed_phase(chain, given_BxL, step)
    rows = network.recomputed_rows(chain, params, x_BxL, given_BxL, phase)
    return phase, network.scores(chain, params, rows(None))


def score_every_step(chain, params, x_TxBxL, starts=ORIGINS, dtype=None):
    """Scores of every call's window, cached and recomputed [T, B, W, N], and which rows count [T, B, W]."""
    hs, given_BxL, settling = chain.hs, given(starts), settling_rows(chain)
    origin_B = origins(chain, given_BxL)

    def run(params, x_TxBxL):
        per_block = unstacked(chain.config, params)
        cache = kv_cache.empty(chain.config, len(starts), L, dtype or params["embedding"].dtype)
        if max(starts):
            cache = network.prefill(chain, per_block, cache, x_TxBxL[0], max(starts))

        def body(cache, inputs):
            step, x_BxL = inputs
            rows, settled = network.window_rows(chain, per_block, cache, x_BxL, given_BxL, step, settling)
            fast = network.scores(chain, params, rows(None))
            cache = kv_cache.write(cache, *settled)
            _, slow = recomputed_scores(chain, params, x_BxL, given_BxL, step)
            relative_W = hs.window(step)[0] + jnp.arange(hs.width)
            place_BxW = origin_B[:, None] + relative_W[None]
            counts = (place_BxW < L) & (relative_W < hs.window(step)[1])[None]
            slow = jnp.take_along_axis(slow, jnp.minimum(place_BxW, L - 1)[..., None], 1)
            return cache, (fast[..., :N], slow[..., :N], counts)

        return jax.lax.scan(body, cache, (jnp.arange(hs.num_steps), x_TxBxL))[1]

    return [np.asarray(x) for x in jit(run)(params, x_TxBxL)]


def assert_scores_agree(chain, params, x_TxBxL, tolerance, **options):
    """Cached and recomputed scores differ by no more than a share of their scale."""
    fast, slow, counts = score_every_step(chain, params, x_TxBxL, **options)
    assert counts.any((0, 2)).all()
    assert slow[counts].std() > 0.3
    np.testing.assert_allclose(fast[counts], slow[counts], rtol=0, atol=tolerance * np.abs(slow[counts]).max())
    return fast, counts
