"""Categorical draws against the float64 law, deep into the tail; filters against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from hdlm_jax.diffusion import categorical as cat
from hdlm_jax.errors import UserError


def draw(rng, logits_V, draws, chunk=256):
    """`draws` independent draws from one law, a chunk at a time."""

    def some(rng):
        return cat.categorical(rng, jnp.broadcast_to(logits_V, (chunk, logits_V.shape[0])))

    return np.asarray(jax.jit(lambda rngs: jax.lax.map(some, rngs))(jax.random.split(rng, draws // chunk))).ravel()


@pytest.mark.parametrize("V", [3, 64, 130])
def test_draws_follow_softmax(V):
    logits_V = np.random.default_rng(V).normal(size=V) * 1.5
    logits_V[1] = -np.inf
    counts = np.bincount(draw(jax.random.key(V), jnp.array(logits_V, jnp.float32), 51_200), minlength=V)
    law = softmax(logits_V)
    assert len(counts) == V
    assert counts[1] == 0
    assert chisquare(counts[law > 0], law[law > 0] * counts.sum()).pvalue > 1e-4


def test_shapes_dtypes_and_a_batch_of_laws():
    certain = np.array([[0, 63, 64], [65, 199, 128]])
    logits_AxBxV = np.where(np.arange(200) == certain[..., None], -5.0, -np.inf)
    for dtype in (jnp.bfloat16, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            tokens = cat.categorical(jax.random.key(0), jnp.asarray(logits_AxBxV, dtype))
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, certain)


def test_impossible_tokens_are_never_drawn_however_the_cdf_rounds():
    weights_K = np.zeros(800, np.float32)
    possible = np.arange(3, 800, 7)
    weights_K[possible] = 10.0 ** np.random.default_rng(0).uniform(-9, 0, len(possible))
    ends = np.array([0.0, 1.0, 2.0**22, 2.0**23 - 2, 2.0**23 - 1])
    unit, part = (x.ravel() for x in np.meshgrid(ends, [0.0, 0.5, 1 - 2.0**-24]))
    rng = np.random.default_rng(1)
    unit = np.concatenate([unit, rng.integers(0, 2**23, 20_000)], dtype=np.float32)
    part = np.concatenate([part, rng.uniform(size=20_000)], dtype=np.float32)
    assert np.isin(cat.invert(weights_K, unit, part), possible).all()


def measured_tail(weights_K, units, parts=64):
    """The share of the uniforms, each in units of 2^-23, that leads to each index; the last `units` only."""
    unit = np.repeat(cat.UNITS - units + np.arange(units), parts).astype(np.float32)
    part = np.tile((np.arange(parts) + 0.5) / parts, units).astype(np.float32)
    index = cat.invert(weights_K.astype(np.float32), unit, part)
    return np.bincount(np.asarray(index), minlength=len(weights_K)) / parts


def test_a_tail_far_below_the_step_of_one_float32_keeps_its_law():
    """782 blocks hold 1e-5 of the mass behind one block with the rest: each a tenth of a float32 step."""
    tail = np.random.default_rng(5).uniform(0.2, 1.8, 782)
    law = np.concatenate([[1.0], 1e-5 / 782 * tail])
    law /= law.sum()
    measured = measured_tail(law, units=120, parts=512)
    expected = law[1:] * cat.UNITS
    assert expected.max() < 0.2
    np.testing.assert_allclose(measured[1:], expected, atol=4 / 512)
    np.testing.assert_allclose(measured[1:].sum(), expected.sum(), rtol=1e-3)


@pytest.mark.parametrize("mass", [1e-6, 1e-7])
def test_single_tokens_behind_a_heavy_one_keep_their_law(mass):
    law = np.array([0.3, 0.7 - 4 * mass, mass, 0.0, 3 * mass])
    measured = measured_tail(law, units=40, parts=4096)
    np.testing.assert_allclose(measured[[2, 4]], law[[2, 4]] * cat.UNITS, rtol=2e-3)
    assert measured[3] == 0


def test_draws_match_float64_in_the_tail_of_a_large_vocabulary():
    """Half of the mass on one token, the rest on 50k tokens of 1e-6 to 1e-4 each, by size and by place."""
    V, draws = 50_257, 8192
    rng = np.random.default_rng(9)
    logits_V = rng.normal(size=V).astype(np.float32)
    logits_V[31_415] = np.log(np.exp(logits_V.astype(float)).sum())
    law = softmax(logits_V.astype(float))
    tokens = draw(jax.random.key(2), jnp.array(logits_V), draws)
    order = np.argsort(np.argsort(law))
    for group in (order * 12 // V, np.arange(V) // (V // 12)):
        counts = np.bincount(group[tokens], minlength=group.max() + 1)
        expected = np.bincount(group, weights=law) * draws
        keep = expected > 5
        assert chisquare(counts[keep], expected[keep] * counts[keep].sum() / expected[keep].sum()).pvalue > 1e-4


def plain_filter(logits_V, temperature, top_k, top_p):
    """The filters by sorting, without ties."""
    logits_V = logits_V / temperature
    order = np.argsort(-logits_V)
    mass = np.cumsum(softmax(logits_V[order[:top_k]]))
    kept = order[:top_k][: 1 + np.searchsorted(mass, top_p)]
    return np.where(np.isin(np.arange(len(logits_V)), kept), logits_V, -np.inf)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.7, 12, 0.8), (1.3, 40, 0.5), (2.0, 5, 0.999)])
def test_filters_agree_with_sorting(temperature, top_k, top_p):
    logits_BxV = np.random.default_rng(top_k).normal(size=(6, 40)).astype(np.float32)
    ours = jax.jit(lambda logits: cat.filter_logits(logits, temperature, top_k, top_p))(logits_BxV)
    theirs = np.array([plain_filter(row, temperature, top_k, top_p) for row in logits_BxV])
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_filters_at_their_ends():
    logits_BxV = np.random.default_rng(0).normal(size=(3, 2, 9)).astype(np.float32)
    assert cat.filter_logits(logits_BxV) is logits_BxV
    assert cat.keep_top_k(logits_BxV, 9) is logits_BxV
    greedy = jax.jit(lambda x: (cat.with_temperature(x, 0), cat.keep_top_k(x, 1), cat.keep_top_p(x, 1e-6)))
    for filtered in greedy(logits_BxV):
        assert (np.isfinite(filtered).sum(-1) == 1).all()
        np.testing.assert_array_equal(np.argmax(filtered, -1), logits_BxV.argmax(-1))
    logits_BxV[..., 4] = -np.inf
    filtered = np.asarray(jax.jit(cat.filter_logits, static_argnums=(1, 2, 3))(logits_BxV, 0.5, 8, 0.99))
    assert not np.isnan(filtered).any()
    assert (filtered[..., 4] == -np.inf).all()


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda x: cat.filter_logits(x, temperature=-1.0), "sampler.temperature"),
        (lambda x: cat.filter_logits(x, temperature=float("inf")), "sampler.temperature"),
        (lambda x: cat.filter_logits(x, top_k=-1), "sampler.top_k"),
        (lambda x: cat.filter_logits(x, top_k=1.5), "sampler.top_k"),
        (lambda x: cat.filter_logits(x, top_p=0.0), "sampler.top_p"),
        (lambda x: cat.filter_logits(x, top_p=1.1), "sampler.top_p"),
    ],
)
def test_bad_dials_name_their_field(call, field):
    with pytest.raises(UserError, match=field):
        call(jnp.zeros(4))
