"""Losses against the exact divergences of the oracle, closed forms, brute force, and the published loss."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from hdlm_jax.diffusion import hyperschedules, losses, noise_schedules, noising, phases
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.errors import UserError
from tests.oracle import hdlm_oracle as oracle

N, EPSILON = 5, 0.2
ABSORB, HYBRID = noising.absorb(N), noising.epsilon_hybrid(N, EPSILON)
UNIFORM, GAMMA, GIDD = noising.uniform(N), noising.gamma_hybrid(N, 0.3), noising.gidd(N, 0.2)
CHAINS = {
    "absorb": oracle.Absorb(N),
    "epsilon_hybrid": oracle.Epsilon(N, EPSILON),
    "uniform": oracle.Uniform(N),
    "gamma_hybrid": oracle.Gamma(N, 0.3),
    "gidd": oracle.gidd_hybrid(N, 0.2),
}
TRAINED = {  # a process for each loss of predictions of x0
    "hybrid_cross_entropy": HYBRID,
    "epsilon_nelbo": HYBRID,
    "acs_nelbo": HYBRID,
    "absorb_nelbo": ABSORB,
    "nelbo": GAMMA,
}
FLOATS = {"float32": 2e-5, "float64": 1e-11}
REFERENCE = Path(__file__).parents[1] / "reference" / "losses.npz"


def time_of(process, alpha):
    """The oracle's time at a survival."""
    if process is GIDD:
        return 1 - alpha
    if alpha == 1:
        return 0.0
    if alpha >= process.alpha_max:
        return oracle.ZERO_PLUS
    return np.inf if alpha == 0 else -math.log(alpha)


def scores_of(probs_RxN, rng):
    """Network scores [R, V] with these probabilities: any constant added, -inf at the mask."""
    scores = np.log(probs_RxN) + rng.normal(size=(len(probs_RxN), 1)) * 3
    return np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf)


def step_rows(process, rng):
    """(zt, x0, alpha_t, alpha_s) of every call that can happen, alphas exact in float32."""
    top = process.alpha_max
    pairs = [(0.0, 0.25), (0.0, 1.0), (0.25, 0.75), (0.75, 1.0)]
    pairs += [(top, 1.0)] if top < 1 else []
    rows = []
    for alpha_t, alpha_s in pairs:
        q_NxV = oracle.marginal_table(CHAINS[process.name], time_of(process, alpha_t))
        rows += [(z, x, alpha_t, alpha_s) for x, z in zip(*np.nonzero(q_NxV), strict=True)]
    zt, x0, alpha_t, alpha_s = (np.array(column) for column in zip(*rows, strict=True))
    return zt, x0, alpha_t, alpha_s, rng.dirichlet(np.ones(N), len(zt))


def exact_divergences(process, reading, zt, x0, alpha_t, alpha_s, probs):
    """KL(q(z_s | zt, x0) || p(z_s | zt)) of every row by the oracle."""
    chain, out = CHAINS[process.name], []
    for z, x, at, a_s, p in zip(zt, x0, alpha_t, alpha_s, probs, strict=True):
        t, s = time_of(process, at), time_of(process, a_s)
        if reading == "hybrid":
            p = p / ((np.arange(N) == z) + 1 / N)
        read = oracle.restrict if reading == "posterior" else oracle.cavity_to_posterior
        kernel = oracle.reverse_kernel(chain, s, t, z, read(chain, t, np.asarray(z), p))
        out.append(oracle.kl(oracle.posterior(chain, s, t, z, x), kernel))
    return np.array(out)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("process", "reading"),
    [
        (ABSORB, "posterior"),
        *((HYBRID, reading) for reading in ("posterior", "cavity", "hybrid")),
        *((process, reading) for process in (UNIFORM, GAMMA, GIDD) for reading in ("posterior", "cavity")),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_bounds_are_the_divergence_of_every_discrete_step(process, reading, dtype):
    rng = np.random.default_rng(3)
    zt, x0, alpha_t, alpha_s, probs = step_rows(process, rng)
    theirs = exact_divergences(process, reading, zt, x0, alpha_t, alpha_s, probs)
    with jax.enable_x64(dtype == "float64"):
        at, a_s = jnp.asarray(alpha_t, dtype), jnp.asarray(alpha_s, dtype)
        last = (a_s == 1).astype(dtype)
        phase = Phase(at, a_s, (a_s - at) / (1 - at), last, 0 * last, 0 * last, 0 * last + 1)
        scores = jnp.asarray(scores_of(probs, rng), dtype)
        terms = jax.jit(losses.bound(process, reading).terms)(scores, jnp.asarray(x0), jnp.asarray(zt), phase)
        assert all(term.dtype == dtype and (term >= -1e-6).all() for term in terms.values())
        np.testing.assert_allclose(sum(terms.values()), theirs, atol=FLOATS[dtype] * (1 + theirs.max()))
    np.testing.assert_array_equal(np.asarray(terms["diffusion"])[alpha_s == 1], 0)
    np.testing.assert_array_equal(np.asarray(terms["reconstruction"])[alpha_s < 1], 0)


@pytest.mark.parametrize("schedule", [noise_schedules.linear(), noise_schedules.cosine()], ids=["linear", "cosine"])
@pytest.mark.parametrize(
    ("process", "reading"),
    [
        (ABSORB, "cavity"),
        (HYBRID, "cavity"),
        *((process, reading) for process in (UNIFORM, GAMMA, GIDD) for reading in ("posterior", "cavity")),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_bounds_at_continuous_times_are_the_denoising_score_entropy(process, reading, schedule):
    """The closed forms against the sum over all rates, scores and ratios of the oracle."""
    rng, R, chain = np.random.default_rng(4), 60, CHAINS[process.name]
    zt, x0 = rng.integers(0, chain.K, R), rng.integers(0, N, R)
    if process.frozen:  # an unmasked token is clean, or costs nothing
        zt = np.where(zt < N, x0, zt)
    probs, u = rng.dirichlet(np.ones(N), R), rng.uniform(0.05, 0.95, R)
    with jax.enable_x64(True):
        phase = jax.tree.map(lambda x: x[:, 0], phases.continuous(jnp.asarray(u), 1, schedule, process.alpha_max))
        scores = jnp.asarray(scores_of(probs, rng))
        terms = jax.jit(losses.bound(process, reading, True).terms)(scores, jnp.asarray(x0), jnp.asarray(zt), phase)
        terms = sum(terms.values())
        alpha, slope = np.asarray(phase.alpha_t), np.asarray(schedule.derivative(jnp.asarray(u)))
    read, theirs = oracle.restrict if reading == "posterior" else oracle.cavity_to_posterior, []
    for z, x, a, p in zip(zt, x0, alpha, probs, strict=True):
        t, z = time_of(process, a), np.asarray(z)
        model = oracle.score_from_mean(chain, t, z, read(chain, t, z, p))
        theirs.append(oracle.dse(chain, t, z, oracle.true_score(chain, t, z, x), model))
    per_alpha = np.array(theirs) / (1 if process is GIDD else alpha)
    np.testing.assert_allclose(terms, per_alpha * -slope, rtol=1e-9)


def test_the_reconstruction_at_0_plus_reads_tokens_by_the_cavity():
    rng = np.random.default_rng(6)
    zt, x0 = (grid.ravel() for grid in np.indices((N, N)))
    probs = rng.dirichlet(np.ones(N), N * N)
    one, zero = jnp.ones(N * N), jnp.zeros(N * N)
    phase = Phase(one * HYBRID.alpha_max, one, zero, one / 0.1, zero, zero, zero)
    scores, x0, zt = jnp.asarray(scores_of(probs, rng), jnp.float32), jnp.asarray(x0), jnp.asarray(zt)
    terms = jax.jit(losses.build("epsilon_nelbo", HYBRID).terms)(scores, x0, zt, phase)
    theirs = oracle.cavity_to_posterior(CHAINS["epsilon_hybrid"], oracle.ZERO_PLUS, zt, probs)
    np.testing.assert_allclose(terms["reconstruction"], -10 * np.log(theirs[np.arange(N * N), x0]), rtol=2e-5)
    np.testing.assert_array_equal(terms["diffusion"], 0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.2, 0.9])
def test_smoothed_kl_is_the_sum_over_the_vocabulary(epsilon):
    rng, R = np.random.default_rng(1), 30
    probs, x0 = rng.dirichlet(np.full(N, 0.3), R), rng.integers(0, N, R).astype(np.int32)
    smooth = lambda p: (1 - epsilon) * p + epsilon / N
    theirs = oracle.kl(smooth(np.eye(N)[x0]), smooth(probs))
    scores = scores_of(probs, rng)
    ours = jax.jit(losses.smoothed_kl, static_argnums=(2, 3))
    np.testing.assert_allclose(ours(jnp.asarray(scores, jnp.float32), x0, N, epsilon), theirs, atol=1e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours(jnp.asarray(scores), x0, N, epsilon), theirs, atol=1e-12)


@pytest.mark.parametrize(("num_tokens", "tolerance"), [(8, 1e-6), (50257, 1e-5)])
def test_smoothed_kl_in_float32(num_tokens, tolerance):
    """Relative to the sum of the absolute terms of its closed form."""
    rng, R = np.random.default_rng(7), 8
    scores = (rng.normal(size=(R, num_tokens)) * 2).astype(np.float32)
    x0, log_p = rng.integers(0, num_tokens, R), log_softmax(scores.astype(float), -1)
    ours = jax.jit(losses.smoothed_kl, static_argnums=(2, 3))
    for epsilon in (0.01, 0.5):
        c, h = 1 - epsilon, epsilon / num_tokens
        log_smooth = np.log(c * np.exp(log_p) + h)
        constants = (c + h) * np.log(c + h), (num_tokens - 1) * h * np.log(h)
        terms = [*(np.full(R, x) for x in constants), -c * log_smooth[np.arange(R), x0], -h * log_smooth.sum(1)]
        error = np.abs(ours(jnp.asarray(scores), x0, num_tokens, epsilon) - sum(terms))
        assert (error < tolerance * sum(map(np.abs, terms))).all()


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 0.95])
@pytest.mark.parametrize("reading", noising.READINGS)
def test_posterior_cross_entropy_is_that_of_the_converted_probabilities(epsilon, reading):
    process, rng = noising.epsilon_hybrid(N, epsilon), np.random.default_rng(2)
    zt, x0 = (grid.ravel() for grid in np.indices((N + 1, N)))
    with jax.enable_x64(True):
        probs = jnp.asarray(rng.dirichlet(np.ones(N), len(zt)))
        scores = jnp.asarray(scores_of(np.asarray(probs), rng))
        zt, x0 = jnp.asarray(zt), jnp.asarray(x0)
        p = jax.jit(jax.vmap(lambda z, p_N: noising.to_posterior(process, z, p_N, 0.5, reading)))(zt, probs)
        of_odds = jax.jit(lambda odds: losses.posterior_cross_entropy(scores, x0, zt, N, odds), static_argnums=0)
        ours = of_odds(process.log_odds(reading))
        np.testing.assert_allclose(ours, -np.log(np.take_along_axis(np.asarray(p), x0[:, None], 1)[:, 0]), atol=1e-12)


def published_runs():
    data = np.load(REFERENCE)
    return sorted({name.split("/")[0] for name in data.files if "/" in name}), data


def published_phase(data, run):
    """[3, 16] fields of the phase that a published run drew.

    Without a schedule p = (1 - 1e-4) t + 1e-4. Under a block schedule of tau levels the published level l = 0 ..
    tau - 1 stands for p = 1e-3 + l (1 - 2e-3) / (tau - 1), and its step counts from 1: ours is one higher, one earlier.
    """
    shape = data["input_ids"].shape
    if f"{run}/step" not in data:
        p = np.broadcast_to((1 - 1e-4) * data[f"{run}/rand0"][:, None] + 1e-4, shape)
        active = np.ones(shape, bool)
    else:
        tau, step = int(data[f"{run}/tau"]), int(data[f"{run}/step"]) - 1
        hs = hyperschedules.block(shape[1], int(data[f"{run}/width"]), f"{data[f'{run}/width']}/{tau}")
        level = np.broadcast_to(hs.levels_at(step), shape)
        active = np.broadcast_to(np.asarray(hs.regions(step)) == hyperschedules.ACTIVE, shape)
        p = np.where(active, 1e-3 + (level - 1) * (1 - 2e-3) / (tau - 1), 1.0)
    p = jnp.asarray(p, jnp.float32)
    weight = jnp.where(active, 1 / p, 0.0)
    return Phase(1 - p, jnp.ones_like(p), weight, *[0 * weight] * 4), active


@pytest.mark.parametrize("run", published_runs()[0])
def test_the_published_loss_its_weights_and_its_gradient(run):
    """Aligned runs, as published up to the scale: theirs is a mean over the active positions of all texts.

    The 1/(1 - p) of tokens belongs to the runs without a schedule only. Plain runs (std) have no shuffle and train
    masks only. Not comparable: shifted runs (they drop rows that hold a mask and predict a token), and schedules
    other than block, or with a level drawn inside its step (their levels have no counterpart here).
    """
    data = published_runs()[1]
    x0, zt = jnp.asarray(data["input_ids"]), jnp.asarray(data[f"{run}/noisy"])
    phase, active = published_phase(data, run)
    vocabulary = data["logits"].shape[-1] - 1
    if run.startswith("hyb"):
        process = noising.epsilon_hybrid(vocabulary, float(data[f"{run}/epsilon"]))
        loss = losses.hybrid_cross_entropy(process, float(data[f"{run}/lamb"]), "step" not in run)
    else:
        loss = losses.absorb_nelbo(noising.absorb(vocabulary))

    def mean(scores):
        terms = loss.terms(scores, x0, zt, phase)
        return sum(term.sum() for term in terms.values()) / active.sum(), sum(terms.values())

    (value, terms), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(data["logits"]))
    nats = -np.take_along_axis(log_softmax(data["logits"], -1), data["input_ids"][..., None], -1)[..., 0]
    if not run.startswith("hyb"):
        np.testing.assert_allclose(value, data[f"{run}/loss"], rtol=1e-5)
        np.testing.assert_allclose(gradient, data[f"{run}/grad_logits"], atol=1e-6)
        return
    weights = data[f"{run}/weights"]
    np.testing.assert_allclose((weights * nats).sum() / active.sum(), data[f"{run}/loss"], rtol=1e-5)
    # a token shuffled to itself weighs as shuffled there; here every unchanged token takes the mean of both weights
    epsilon, unchanged = process.epsilon, np.asarray((zt == x0) & (phase.mask_weight > 0))
    kept, to_itself = 1 - epsilon, epsilon / vocabulary
    mean_weight = (kept * epsilon + to_itself * (1 - epsilon)) / (kept + to_itself)
    token = float(data[f"{run}/lamb"]) / (np.asarray(phase.alpha_t) if "step" not in run else 1)
    expected = np.where(unchanged, mean_weight * token, weights)
    np.testing.assert_allclose(terms / nats, expected, rtol=2e-5, atol=1e-6)
    scale = np.where(unchanged, expected / np.where(unchanged, weights, 1), 1)
    np.testing.assert_allclose(gradient, data[f"{run}/grad_logits"] * scale[..., None], atol=1e-6)
    as_shuffled = unchanged & (weights > 1.5 * epsilon * token)
    assert as_shuffled.sum() == (run == "hyb_aligned_plain_e0.3_l0.1")  # the one token shuffled to itself


def test_the_hybrid_loss_names_its_terms_and_leaves_settled_positions_alone():
    x0, zt = jnp.array([0, 0, 0, 0]), jnp.array([N, 1, 0, 0])
    one = jnp.ones(4)
    phase = Phase(one / 2, one, jnp.array([2.0, 2.0, 2.0, 0.0]), *[0 * one] * 4)
    terms = losses.hybrid_cross_entropy(HYBRID, 0.5).terms(jnp.zeros((4, N + 1)), x0, zt, phase)
    nats = math.log(N + 1)
    np.testing.assert_allclose(terms["mask"], [2 * nats, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(terms["shuffled"], [0, 0.5 * (1 - EPSILON) / 0.5 * nats, 0, 0], rtol=1e-6)
    unchanged = EPSILON * (1 - EPSILON) * (1 + 1 / N) / (1 - EPSILON + EPSILON / N)
    np.testing.assert_allclose(terms["clean"], [0, 0, 0.5 * unchanged / 0.5 * nats, 0], rtol=1e-6)


@pytest.mark.parametrize("kind", TRAINED)
def test_padded_columns_change_nothing(kind):
    process = TRAINED[kind]
    rng = np.random.default_rng(7)
    zt, x0, alpha_t, alpha_s, probs = step_rows(process, rng)
    scores = scores_of(probs, rng)
    columns = np.stack([alpha_t, alpha_s, 1 - alpha_t, alpha_s == 1, zt, zt, alpha_t >= 0])
    phase = Phase(*jnp.asarray(columns, jnp.float32))
    terms = jax.jit(losses.build(kind, process).terms)
    padded = np.pad(scores, ((0, 0), (0, 3)), constant_values=-np.inf)
    ours, theirs = (
        terms(jnp.asarray(s, jnp.float32), jnp.asarray(x0), jnp.asarray(zt), phase) for s in (padded, scores)
    )
    assert {name: bool((ours[name] == theirs[name]).all()) for name in ours} == dict.fromkeys(theirs, True)


@pytest.mark.parametrize("kind", TRAINED)
def test_gradients_are_finite_where_the_mask_is_impossible_and_rows_are_settled(kind):
    process = TRAINED[kind]
    scores = jnp.zeros((4, N + 1)).at[:, N].set(-jnp.inf)
    x0, zt, zero = jnp.array([0, 0, 0, 0]), jnp.array([N, 1, 0, 0]), jnp.zeros(4)
    alpha, weight = jnp.array([0.0, 0.5, 0.5, 1.0]), jnp.array([1.0, 1.0, 1.0, 0.0])
    phase = Phase(alpha, jnp.ones(4), weight, weight, zero, zero, weight)
    total = lambda s: sum(term.sum() for term in losses.build(kind, process).terms(s, x0, zt, phase).values())
    gradient = jax.jit(jax.grad(total))(scores)
    assert bool(jnp.isfinite(gradient).all()) and not gradient[:, N].any() and not gradient[3].any()


def test_readings_and_bounds_by_name():
    of = {kind: losses.build(kind, process) for kind, process in TRAINED.items()}
    assert {kind: (loss.reading, loss.is_bound) for kind, loss in of.items()} == {
        "hybrid_cross_entropy": ("hybrid", False),
        "epsilon_nelbo": ("cavity", True),
        "acs_nelbo": ("cavity", True),
        "absorb_nelbo": ("posterior", True),
        "nelbo": ("cavity", True),
    }
    assert losses.build("hybrid_cross_entropy", ABSORB).reading == "posterior"
    assert all(loss.name == kind for kind, loss in of.items())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("process", [ABSORB, HYBRID, UNIFORM, GAMMA, GIDD], ids=lambda process: process.name)
def test_the_prior_divergence_is_the_oracles(process, alpha):
    chain, time = CHAINS[process.name], time_of(process, alpha)
    theirs = oracle.prior_kl(chain, time, 2, oracle.default_prior(chain, time))
    np.testing.assert_allclose(losses.prior_kl(process, alpha, np.arange(N)), np.full(N, theirs), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.build("absorb", ABSORB), r"loss.kind: got 'absorb'.*allowed: 'absorb_nelbo'"),
        (
            lambda: losses.build("absorb_nelbo", HYBRID),
            r"got 'absorb_nelbo' with noising.kind 'epsilon_hybrid'",
        ),
        (
            lambda: losses.build("epsilon_nelbo", noising.gamma_hybrid(N, 0.1)),
            r"noising.kind 'gamma_hybrid'; allowed for this process: 'nelbo'",
        ),
        (lambda: losses.build("nelbo", noising.uniform(N), reading="hybrid"), r"loss.reading: got 'hybrid'"),
        (lambda: losses.build("nelbo", noising.uniform(1)), r"noising.num_tokens: got 1; allowed: at least 2"),
        (lambda: losses.acs_bound(ABSORB, 0.5, "posterior"), r"noising.kind: got 'absorb'; allowed: 'epsilon_hybrid'"),
        (lambda: losses.build("hybrid_cross_entropy", HYBRID, -1.0), r"loss.token_weight: got -1.0"),
        (lambda: losses.bound(noising.uniform(N), "raw"), r"reading: got 'raw'; allowed: 'cavity', 'posterior'"),
        (lambda: losses.bound(HYBRID, "raw"), r"noising.reading: got 'raw'; allowed: 'cavity', 'hybrid', 'posterior'"),
    ],
)
def test_pairs_that_do_not_belong_together_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()
