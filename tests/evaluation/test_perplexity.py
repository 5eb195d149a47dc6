"""The estimated bound: its arithmetic, its standard error, and its mean against exact bounds."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import likelihood
from hdlm_jax.diffusion.likelihood import ReverseChain
from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import perplexity
from hdlm_jax.evaluation.perplexity import Bound
from hdlm_jax.models import layouts, transformer
from tests.models import tiny
from tests.oracle import hdlm_oracle as oracle

EPSILON = {"noising__kind": "epsilon_hybrid", "noising__epsilon": 0.3, "loss__kind": "epsilon_nelbo"}
ABSORB = {"noising__kind": "absorb", "loss__kind": "absorb_nelbo"}
FLAT = {"hyperschedule__kind": "flat", "hyperschedule__steps": 4}
GEOMETRIC = {"noise_schedule__kind": "geometric", "noise_schedule__smin": 0.2, "noise_schedule__smax": 1.5}
SHIFTED = {"model__visibility": "prefix", "model__prediction": "shifted"}


def test_nats_bits_and_bytes():
    bound = Bound(2.0, 0.1, {"diffusion": 1.5, "prior": 0.5}, 300, 900.0, 4, "slide: ...")
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
    assert bound.terms == {"mask": pytest.approx(bound.nats_per_token), "prior": 0.0}


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


@pytest.mark.parametrize(
    ("fields", "chain", "times", "reading"),
    [
        pytest.param(EPSILON, oracle.Epsilon(2, 0.3), (oracle.ZERO_PLUS, 40.0), "cavity", id="epsilon"),
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
        p = table.copy()
        for i, t in enumerate(times_L):
            z = oracle.grid(chain, 2)[i]
            if reading == "hybrid":
                p[..., i, :] /= np.eye(3, 2)[z] + 1 / 2
            p[..., i, :] = oracle.cavity_to_posterior(chain, t, z, p[..., i, :])
        return p

    def safe(times_L):  # no mask yet at 0+: nothing is asked there
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(denoiser(times_L), nan=0.5)

    exact = oracle.ct_nelbo(chain, x0_L, safe, times[1], times[0], n=60) / 2
    draw = perplexity.estimator(made, reading)
    bound = perplexity.estimate(draw, params, [batch], 1.0, draws=40, seed=1, hyperschedule="x")
    assert bound.standard_error < 0.01 * exact
    assert abs(bound.nats_per_token - exact) < 4 * bound.standard_error


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
