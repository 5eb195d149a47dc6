"""The estimated bound: its arithmetic, its standard error, and its mean against exact bounds."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import likelihood, phases, reverse
from hdlm_jax.diffusion.likelihood import ReverseChain
from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import perplexity
from hdlm_jax.evaluation.perplexity import Bound
from hdlm_jax.models import layouts, passes, transformer
from tests.models import tiny
from tests.oracle import hdlm_oracle as oracle

EPSILON = {"noising__kind": "epsilon_hybrid", "noising__epsilon": 0.3, "loss__kind": "epsilon_nelbo"}
ABSORB = {"noising__kind": "absorb", "loss__kind": "absorb_nelbo"}
UNIFORM = {"noising__kind": "uniform", "loss__kind": "nelbo"}
GAMMA = {"noising__kind": "gamma_hybrid", "noising__gamma": 0.4, "loss__kind": "nelbo"}
GIDD = {"noising__kind": "gidd", "noising__uniform_share": 0.3, "loss__kind": "nelbo"}
FLAT = {"hyperschedule__kind": "flat", "hyperschedule__steps": 4}
GEOMETRIC = {"noise_schedule__kind": "geometric", "noise_schedule__smin": 0.2, "noise_schedule__smax": 1.5}
CLIPPED = {"noise_schedule__kind": "clipped", "noise_schedule__base": "linear", "noise_schedule__eps": 0.1}
SHIFTED = {"model__visibility": "prefix", "model__prediction": "shifted"}


def test_nats_bits_and_bytes():
    terms, errors = {"diffusion": 1.5, "prior": 0.5}, {"diffusion": 0.1, "prior": 0.0}
    bound = Bound(2.0, 0.1, terms, errors, 300, 900.0, 4, "slide: ...")
    assert bound.perplexity == pytest.approx(math.e**2)
    assert bound.bits_per_byte == pytest.approx(2.0 / math.log(2) / 3)
    assert bound.bits_per_byte_error == pytest.approx(0.1 / math.log(2) / 3)
    plain = json.loads(json.dumps(bound.to_json()))
    assert plain["perplexity"] == bound.perplexity and plain["terms"] == {"diffusion": 1.5, "prior": 0.5}
    assert set(plain) == {*Bound._fields, "perplexity", "bits_per_byte", "bits_per_byte_error"}
    for part in (
        "0.9618 +- 0.0481 bits/byte",
        "2.0000 +- 0.1000 nats/token",
        "7.389",
        "300 tokens, 4 draws, slide: ...",
    ):
        assert part in str(bound)
    assert "slide: ...; every step)" in str(bound._replace(enumerated="every step"))


def noisy_draw(params, tokens_BxL, valid_BxL, rng):
    """A stand-in for an estimator: each valid token costs its own id, each window has noise of spread 2."""
    noise_B = 2 * jax.random.normal(rng, tokens_BxL.shape[:1]) * valid_BxL.any(1)
    return {"one": (tokens_BxL * valid_BxL).sum(1) + noise_B, "two": 0.5 * valid_BxL.sum(1)}


def test_means_and_errors_are_per_valid_token():
    tokens = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    valid = np.ones((2, 3, 4), bool)
    valid[1, 1, 2:], valid[1, 2] = False, False  # a last window cut short, and a row that only fills the batch
    batches = list(zip(tokens, valid, strict=True))
    bound = perplexity.estimate(noisy_draw, None, batches, 2.5, draws=400, seed=0, hyperschedule="x")
    count, windows = 18, 5
    assert (bound.tokens, bound.draws, bound.num_bytes) == (count, 400, 45.0)
    error = 2 * (windows / 400) ** 0.5 / count
    assert bound.standard_error == pytest.approx(error, rel=0.1)
    assert abs(bound.terms["one"] - tokens[valid].mean()) < 4 * error
    assert bound.terms["two"] == pytest.approx(0.5)
    assert bound.nats_per_token == pytest.approx(sum(bound.terms.values()))


def test_the_error_of_two_draws_by_hand():
    """Windows of 3 and 5, then 2 and 8 nats: variances 2 and 18, halved by the two draws, over 4 tokens."""
    nats = iter([{"one": np.array([3.0, 2.0])}, {"one": np.array([5.0, 8.0])}])
    batch = (np.zeros((2, 2), np.int32), np.ones((2, 2), bool))
    bound = perplexity.estimate(lambda *_: next(nats), None, [batch], 1.0, draws=2, seed=0, hyperschedule="x")
    assert bound.nats_per_token == pytest.approx(9 / 4)
    assert bound.standard_error == bound.errors["one"] == pytest.approx(10**0.5 / 4)


def test_too_few_draws_and_nothing_to_count_are_refused():
    batch = (np.zeros((1, 4), np.int32), np.ones((1, 4), bool))
    with pytest.raises(UserError, match=r"--draws: got 1; allowed: at least 2"):
        perplexity.estimate(noisy_draw, None, [batch], 1.0, draws=1, seed=0, hyperschedule="x")
    for batches in ([], [(batch[0], ~batch[1])]):
        with pytest.raises(UserError, match=r"text: got 'no tokens'"):
            perplexity.estimate(noisy_draw, None, batches, 1.0, draws=2, seed=0, hyperschedule="x")


def test_the_bound_is_named_after_its_hyperschedule():
    flat, slide = tiny.build(5, 8, **EPSILON, **FLAT), {"kind": "slide", "width": 4, "rate": "2"}
    slide = tiny.build(5, 8, **EPSILON, **SHIFTED, **{f"hyperschedule__{k}": v for k, v in slide.items()})
    assert perplexity.name_of(flat) == "flat, continuous times"
    assert perplexity.name_of(slide).startswith("slide: L=8, width 4, rate 2")


def test_an_autoregressive_bound_is_exact_and_counts_valid_tokens_only():
    made = tiny.build(5, 6, **ABSORB, **SHIFTED, hyperschedule__kind="quenched")
    params = tiny.random_params(made.model)
    tokens = np.random.default_rng(0).integers(0, 5, (3, 6)).astype(np.int32)
    valid = np.arange(6)[None] < np.array([[6], [4], [0]])
    draw = perplexity.estimator(made, "posterior")
    bound = perplexity.estimate(draw, params, [(tokens, valid)], 1.0, draws=3, seed=0, hyperschedule="x")

    @jax.jit
    def chain_rule(params):
        rows = layouts.causal(made.model, jnp.asarray(tokens))
        hidden, _ = transformer.forward(made.model, params, rows.tokens, rows.positions, rows.attention)
        return jax.nn.log_softmax(transformer.logits(made.model, params, hidden))

    log_p = np.take_along_axis(np.asarray(chain_rule(params)), tokens[..., None], -1)[..., 0]
    assert bound.nats_per_token == pytest.approx(-log_p[valid].mean(), rel=1e-5)
    assert bound.standard_error < 1e-6 and bound.tokens == 10
    assert bound.terms == {"prior": 0.0, "diffusion": 0.0, "reconstruction": pytest.approx(bound.nats_per_token)}
    whole = perplexity.every_step(made)
    assert whole == ("every step enumerated by 1 pass, no noise to draw", True)
    exact = perplexity.estimator(made, "posterior", exact=True)
    exact = perplexity.estimate(exact, params, [(tokens, valid)], 1.0, 3, 0, "x", whole)
    assert exact.nats_per_token == pytest.approx(bound.nats_per_token, rel=1e-6)
    assert (exact.standard_error, exact.draws, set(exact.errors.values())) == (0.0, 1, {0.0})


@pytest.fixture(scope="module")
def two_positions():
    """A flat full model of two positions and two tokens, its tables, and a text repeated over a batch."""
    made = tiny.build(2, 2, **EPSILON, **FLAT)
    params = tiny.random_params(made.model, scale=1.0)
    z_ZxL = jnp.asarray(list(itertools.product(range(3), repeat=2)), jnp.int32)
    rows = layouts.whole_window(made.model, z_ZxL)

    @jax.jit
    def probabilities(params):
        hidden, _ = transformer.forward(made.model, params, rows.tokens, rows.positions, rows.attention)
        return jax.nn.softmax(transformer.logits(made.model, params, hidden))[..., :2]

    x0_L = np.array([1, 0])
    batch = (np.tile(x0_L.astype(np.int32), (256, 1)), np.ones((256, 2), bool))
    return made, params, np.asarray(probabilities(params), float).reshape(3, 3, 2, 2), x0_L, batch


def assert_unbiased(made, reading, params, batch, exact, spread=0.01):
    draw = perplexity.estimator(made, reading)
    bound = perplexity.estimate(draw, params, [batch], 1.0, draws=40, seed=1, hyperschedule="x")
    assert bound.standard_error < spread * exact
    assert abs(bound.nats_per_token - exact) < 4 * bound.standard_error


@pytest.mark.parametrize(
    ("fields", "chain", "times", "reading"),
    [
        pytest.param(EPSILON, oracle.Epsilon(2, 0.3), (oracle.ZERO_PLUS, 40.0), "cavity", id="epsilon"),
        pytest.param(GAMMA | GEOMETRIC, oracle.Gamma(2, 0.4), (0.2, 1.5), "posterior", id="gamma-geometric"),
        pytest.param(
            *(UNIFORM | GEOMETRIC, oracle.Uniform(2), (0.2, 1.5), "cavity"),
            id="uniform-geometric",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(GIDD | CLIPPED, oracle.gidd_hybrid(2, 0.3), (0.1, 0.9), "cavity"),
            id="gidd-clipped",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(EPSILON | GEOMETRIC, oracle.Epsilon(2, 0.3), (0.2, 1.5), "hybrid"),
            id="epsilon-geometric",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(ABSORB | GEOMETRIC, oracle.Absorb(2), (0.2, 1.5), "posterior"),
            id="absorb-geometric",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_continuous_times_estimate_the_exact_bound(two_positions, fields, chain, times, reading):
    """The integral over all times, with the reconstruction at 0+ and the prior, per token and with 4 sigma."""
    _, params, table, x0_L, batch = two_positions
    made = tiny.build(2, 2, **fields, **FLAT)

    def denoiser(times_L):
        p = table[: chain.K, : chain.K].copy()
        for i, t in enumerate(times_L):
            z = oracle.grid(chain, 2)[i]
            if reading == "hybrid":
                p[..., i, :] /= np.eye(3, 2)[z] + 1 / 2
            read = oracle.restrict if reading == "posterior" else oracle.cavity_to_posterior
            p[..., i, :] = read(chain, t, z, p[..., i, :])
        return p

    def safe(times_L):  # no mask yet at 0+: nothing is asked there
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(denoiser(times_L), nan=0.5)

    exact = oracle.ct_nelbo(chain, x0_L, safe, times[1], times[0], n=60) / 2
    assert_unbiased(made, reading, params, batch, exact)


def test_a_tiled_estimate_is_of_the_enumerated_bound_and_so_is_its_spread():
    """The whole estimator; its standard error is that of the estimates of many seeds where nothing is stratified."""
    N, L = 2, 3
    block = {"hyperschedule__kind": "block", "hyperschedule__width": 3, "hyperschedule__rate": "1"}
    made = tiny.build(N, L, **EPSILON, **SHIFTED, **block)
    params = tiny.random_params(made.model)
    x0_L, draw = np.array([1, 0, 1], np.int32), perplexity.estimator(made, "cavity")
    one_text = (x0_L[None], np.ones((1, L), bool))
    chain = ReverseChain(made.hs, made.schedule, made.process, "cavity")
    enumerated = lambda params: likelihood.nelbo(chain, tiny.plain_denoiser(made, params, True), x0_L).total.mean()
    exact = float(jax.jit(enumerated)(params))
    bounds = [
        perplexity.estimate(draw, params, [one_text], 1.0, draws=4, seed=seed, hyperschedule="x") for seed in range(150)
    ]
    estimates = np.array([bound.nats_per_token for bound in bounds])
    spread = estimates.std(ddof=1)
    assert abs(estimates.mean() - exact) < 4 * spread / len(bounds) ** 0.5
    reported = np.mean([bound.standard_error**2 for bound in bounds]) ** 0.5
    assert abs(spread / reported - 1) < 4 * (1 / (2 * len(bounds)) + 1 / (2 * 3 * len(bounds))) ** 0.5


def test_every_way_to_draw_noise_is_unbiased(two_positions):
    """Against the integral over all times of the oracle; 'auto' is exactly l of L masks here."""
    made, params, table, x0_L, batch = two_positions
    chain = oracle.Absorb(2)
    exact = oracle.ct_nelbo(chain, x0_L, lambda times_L: masked_only(chain, table), 40.0, n=60) / 2
    made = tiny.build(2, 2, **ABSORB, **FLAT)
    assert made.variance == "auto" and passes.variance_of(made, False) == "counts"
    for kind in ("independent", "stratified", "antithetic", "counts"):
        assert_unbiased(made._replace(variance=kind), "posterior", params, batch, exact, spread=0.03)


def masked_only(chain, table):
    """Probabilities [z, z, L, N] with an unmasked token certain of itself."""
    p = table.copy()
    for i in range(2):
        p[..., i, :] = oracle.restrict(chain, 1.0, oracle.grid(chain, 2)[i], p[..., i, :])
    return p


def test_exact_takes_every_step_and_little_noise_in_full(monkeypatch):
    """A tiny block model: the enumerated bound without error; then, with noise drawn, an estimate of it."""
    N, L = 2, 3
    block = {"hyperschedule__kind": "block", "hyperschedule__width": 2, "hyperschedule__rate": "1"}
    made = tiny.build(N, L, **EPSILON, **SHIFTED, **block)
    params, x0_L = tiny.random_params(made.model), np.array([1, 0, 1], np.int32)
    chain = ReverseChain(made.hs, made.schedule, made.process, "cavity")
    enumerated = lambda params: likelihood.nelbo(chain, tiny.plain_denoiser(made, params, True), x0_L).total.mean()
    exact = float(jax.jit(enumerated)(params))
    whole = perplexity.every_step(made)
    assert whole == ("every step enumerated by 2 passes over all 27 noised texts", True)
    batch = (np.tile(x0_L, (2, 1)), np.ones((2, L), bool))
    draw = perplexity.estimator(made, "cavity", exact=True)
    bound = perplexity.estimate(draw, params, [batch], 1.0, 2, 0, "x", whole)
    assert bound.nats_per_token == pytest.approx(exact, rel=1e-5) and bound.standard_error == 0
    monkeypatch.setattr(perplexity, "MAX_TEXTS", 0)
    perplexity.estimator.cache_clear()
    some = perplexity.every_step(made)
    assert some == ("every step enumerated by 2 passes, noise drawn", False)
    batch = (np.tile(x0_L, (64, 1)), np.ones((64, L), bool))
    draw = perplexity.estimator(made, "cavity", exact=True)
    bound = perplexity.estimate(draw, params, [batch], 1.0, 20, 0, "x", some)
    perplexity.estimator.cache_clear()
    assert abs(bound.nats_per_token - exact) < 4 * bound.standard_error < 0.1


def test_exact_refuses_continuous_times(two_positions):
    with pytest.raises(UserError, match=r"--exact: got True; allowed: not for hyperschedule.kind 'flat' .*--eta"):
        perplexity.every_step(two_positions[0])


def test_a_corrected_chain_has_its_own_bound(two_positions):
    """Flat in steps: never below the likelihood of the chain that the sampler runs; eta 0 is the model's own."""
    made, params, table, _, _ = two_positions
    parts = perplexity.in_steps(made)
    assert parts.layout == "plain" and perplexity.name_of(parts, 0.25).endswith(", corrected at eta 0.25")
    every_x0 = np.array(list(itertools.product(range(2), repeat=2)), np.int32)
    z_ZxL, bounds = np.array(list(itertools.product(range(3), repeat=2))), {}
    for eta in (0.0, 1.0):
        draw = perplexity.estimator(parts, "cavity", eta, exact=True)
        terms = draw(params, every_x0, np.ones((4, 2), bool), jax.random.key(0))
        bounds[eta] = np.asarray(sum(terms.values()))
        kernel = reverse.acs(made.process, eta, "cavity").kernel
        law = jax.jit(jax.vmap(jax.vmap(kernel, (0, 0, None, None)), (0, 0, None, None)))
        p_Z = (z_ZxL == 2).all(1).astype(float)
        for step in range(4):
            alphas = phases.survival(jnp.array([4 - step, 3 - step]), 4, made.schedule, made.process.alpha_max)
            step_ZxLxV = np.asarray(law(z_ZxL, table.reshape(9, 2, 2).astype(np.float32), *alphas), float)
            p_Z = np.einsum("z,za,zb->ab", p_Z, step_ZxLxV[:, 0], step_ZxLxV[:, 1]).reshape(9)
        likelihood_X = p_Z.reshape(3, 3)[:2, :2].reshape(4)
        assert likelihood_X.sum() == pytest.approx(1, abs=1e-5)
        assert (bounds[eta] >= -np.log(likelihood_X) - 1e-4).all()
    chain = ReverseChain(parts.hs, parts.schedule, parts.process, "cavity")
    one = lambda params, x0_L: likelihood.nelbo(chain, tiny.plain_denoiser(parts, params, False), x0_L).total.sum()
    markov = jax.jit(jax.vmap(one, (None, 0)))(params, every_x0)
    np.testing.assert_allclose(bounds[0.0], markov, rtol=1e-4)
    assert np.abs(bounds[1.0] - bounds[0.0]).max() > 0.01
    with pytest.raises(UserError, match=r"noising.kind: got 'absorb'; allowed: 'epsilon_hybrid' for a correction"):
        perplexity.estimator(tiny.build(2, 2, **ABSORB, **FLAT), "posterior", 0.5)
