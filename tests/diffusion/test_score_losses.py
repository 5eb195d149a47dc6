"""Score entropy against the oracle, the published outputs, finite differences, and the laws that it bounds."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules, losses, noise_schedules, noising, phases, reverse, score_losses, scores
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.diffusion.scores import Clocks
from hdlm_jax.errors import UserError
from tests.oracle import hdlm_oracle as oracle

GAMMAS = (0.0, 0.01, 0.4, 1.0)
SIGMAS = np.array([1e-4, 0.02, 0.5, 3.0, 8.0], np.float32)
PUBLISHED = np.load(Path(__file__).parents[1] / "reference" / "scores.npz")


def process_of(gamma, num_tokens):
    return {0.0: noising.absorb, 1.0: noising.uniform}.get(gamma, functools.partial(noising.gamma_hybrid, gamma=gamma))(
        num_tokens
    )


def states(gamma, num_tokens):
    """Pairs (z, x) of interest: masked, clean and shuffled, as far as they can be."""
    pairs = {(num_tokens, 1): gamma < 1, (1, 1): True, (2, 1): gamma > 0, (0, num_tokens - 1): gamma > 0}
    return np.array([pair for pair, can_be in pairs.items() if can_be], np.int32).T


def rows_of(gamma, num_tokens):
    z, x = states(gamma, num_tokens).astype(np.int32)
    return np.repeat(z, len(SIGMAS)), np.repeat(x, len(SIGMAS)), np.tile(SIGMAS, len(z))


def entropy(of, log_s, z, x, sigma, targets=scores.targets):
    return score_losses.entropy(of, log_s, z, x, targets(of, z, x, sigma))


run_entropy = jax.jit(entropy, static_argnums=(0, 5))


def parts(of, log_s, z, x, sigma):
    """The sum of the absolute terms of the entropy, float64: what rounding is relative to."""
    to = [np.asarray(part, float) for part in scores.targets(of, z, x, sigma)]
    ids = np.arange(of.num_tokens)
    rate, at_x0, other = (part[:, None] for part in to)
    r = np.where(ids == x[:, None], at_x0, other)
    log = np.log(np.where(r > 0, r, 1))
    log_s = log_s[:, : of.num_tokens].astype(float)
    terms = np.exp(log_s) + r * (np.abs(log_s) + np.abs(log) + 1)
    return (rate * np.where(ids == z[:, None], 0, terms)).sum(-1)


@pytest.mark.parametrize(("num_tokens", "tolerance"), [(8, 1e-6), (50257, 1e-5)])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_entropy_is_the_oracles(gamma, num_tokens, tolerance):
    """In float32, relative to the sum of the absolute terms; the mask's column and padding do not count."""
    of, rng = Clocks(num_tokens, gamma), np.random.default_rng(0)
    z, x, sigma = rows_of(gamma, num_tokens)
    log_s = rng.normal(size=(len(z), num_tokens + 3)).astype(np.float32)
    log_s[:, num_tokens + 1 :] = -np.inf
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # the oracle at the ends of gamma
        wide = log_s[:, : num_tokens + 1].astype(float)
        theirs = oracle.gamma_score_entropy(wide, float(np.float32(gamma)), sigma.astype(float), z, x)
    size = parts(of, log_s, z, x, sigma) + 1e-30
    np.testing.assert_allclose(run_entropy(of, log_s, z, x, sigma) / size, theirs / size, atol=tolerance, rtol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_entropy_is_0_at_the_true_score_and_above_elsewhere(gamma):
    num_tokens, rng = 8, np.random.default_rng(1)
    of = Clocks(num_tokens, gamma)
    z, x, sigma = rows_of(gamma, num_tokens)
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        z, x, sigma = jnp.asarray(z), jnp.asarray(x), jnp.asarray(sigma, float)
        true = jnp.log(scores.exact(of, z, x, sigma))
        size = parts(of, np.maximum(true, -700), *map(np.asarray, (z, x, sigma))) + 1
        np.testing.assert_allclose(run_entropy(of, true, z, x, sigma) / size, 0, atol=1e-14)
        gradient = jax.jit(jax.grad(lambda log_s: entropy(of, log_s, z, x, sigma).sum()))(true)
        np.testing.assert_allclose(gradient / size[:, None], 0, atol=1e-14)
        others = true[:, :num_tokens] + jnp.asarray(rng.normal(size=(len(z), num_tokens)))
        assert (run_entropy(of, others, z, x, sigma)[np.asarray((z == num_tokens) | (gamma > 0))] > 0).all()


def test_published_targets_are_the_exact_ones_at_both_ends():
    for gamma in (0.0, 1.0):
        z, x, sigma = rows_of(gamma, 8)
        of = Clocks(8, gamma)
        ours, theirs = (f(of, z, x, sigma) for f in (scores.targets, score_losses.published_targets))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a * ours.rate, b * ours.rate)  # where it is a channel


# ---- the published outputs: 20 tokens and the mask


def published(name):
    return PUBLISHED[f"se/{name}"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_published_gamma_entropy(gamma, dtype):
    of, name = Clocks(20, gamma), f"QGamma_g{gamma}" + ("_f64" if dtype == "float64" else "")
    with jax.enable_x64(dtype == "float64"):
        log_s, sigma = (jnp.asarray(published(name), dtype) for name in ("log_score", "sigma"))
        z, x = jnp.asarray(published("x")), jnp.asarray(published("x0"))
        ours = run_entropy(of, log_s, z, x, sigma, score_losses.published_targets)
        tolerance = {"float32": 3e-5, "float64": 1e-9}[dtype]
        reachable = (z == 20) | (gamma > 0)
        np.testing.assert_allclose(ours[reachable], published(name)[reachable], rtol=tolerance, atol=tolerance)


def test_the_published_entropies_of_absorb_and_uniform():
    log_s, x, sigma = published("log_score"), published("x0"), published("sigma")
    ours = run_entropy(Clocks(20, 0.0), log_s, published("x"), x, sigma)
    np.testing.assert_allclose(ours, published("Absorbing"), rtol=3e-5, atol=3e-5)
    # there all 21 states are ordinary
    ours = run_entropy(Clocks(21, 1.0), log_s, published("Uniform_x"), x, sigma)
    np.testing.assert_allclose(ours, published("Uniform"), rtol=3e-5, atol=3e-5)


RUNS = sorted({name.split("/")[0] for name in PUBLISHED.files if name.startswith("gamma_")})


@pytest.mark.parametrize("run", RUNS)
def test_the_published_gamma_loss_its_settled_tokens_and_its_gradient(run):
    """Theirs weighs -d log(alpha)/dt at active positions and a thousandth of it at worthless ones.

    The weights of blocks, (number of the block) / (blocks - 1), are theirs alone.
    """
    data = {name: PUBLISHED[f"{run}/{name}"] for name in ("diff", "ce", "perturbed", "sigma", "settled")}
    of, sigma = Clocks(20, float(run.rsplit("_g", 1)[1])), data["sigma"]
    settled, x0 = np.broadcast_to(data["settled"], sigma.shape), published("x0")
    alpha = np.where(settled, 1, np.exp(-sigma)).astype(np.float32)
    weight = np.where(settled, 0, np.where(sigma > 5.2, 1e-3, 1)) * (1 - 5e-3)
    full = lambda x: jnp.full(sigma.shape, x)
    phase = Phase(alpha, alpha, full(0.0), full(0.0), full(int(data["settled"].sum())), full(16), jnp.asarray(weight))
    loss = losses.build("published_score_entropy", process_of(of.gamma, 20), settled_weight=1.0, continuous=True)
    count = int(data["settled"].sum())
    blocks = np.pad(np.arange(count) // 4 / max((count - 1) // 4, 1), (0, 16 - count)) if count > 4 else np.ones(16)
    if "simple_w6" in run:
        blocks = np.pad(np.arange(count) // 6 / max((count - 1) // 6, 1), (0, 16 - count))

    @jax.jit
    def terms(log_score):
        scale = scores.log_scale(of, data["perturbed"], scores.noise_level(alpha), "published_score")
        outputs = log_score + scale[..., None]
        flat = lambda x: jnp.asarray(x).reshape(-1, *x.shape[2:])
        out = loss.terms(flat(outputs), flat(x0), flat(data["perturbed"]), jax.tree.map(flat, phase))
        out = {name: x.reshape(sigma.shape) for name, x in out.items()}
        return out["diffusion"].sum(-1), (out["settled"] * blocks[None]).sum(-1)

    log_score = jnp.asarray(published("log_score"))
    diffusion, settled = terms(log_score)
    np.testing.assert_allclose(diffusion, data["diff"], rtol=1e-4)
    np.testing.assert_allclose(settled, data["ce"], rtol=1e-4)
    gradient = jax.grad(lambda log_score: sum(part.mean() for part in terms(log_score)))(log_score)
    theirs = PUBLISHED[f"{run}/grad_log_score"]
    np.testing.assert_allclose(gradient, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


# ---- the loss and its bound: one position of 4 tokens, everything enumerated

N, LEFT = 4, 0.2  # ordinary tokens, and the survival of pure noise
LINEAR = noise_schedules.linear(LEFT)
CLIPPED = np.exp(-1e-4)  # the alpha above which outputs are scaled as there
DATA, EVEN = np.array([0.5, 0.3, 0.15, 0.05]), np.full(4, 0.25)
ALPHAS = 64  # rows of every phase below: one compiled program serves all
jitted = functools.cache(jax.jit)


def table(of, alpha):
    """q(z | x) [N, V] at a survival."""
    return oracle.marginal_table(oracle.Gamma(N, of.gamma), -np.log(alpha))


def published_scale(of, alpha, z):
    return np.log((1 / min(alpha, CLIPPED) - 1) * N)


def plain_scale(of, alpha, z):
    return np.log(np.expm1(-(1 - of.gamma) * np.log(min(alpha, CLIPPED))) * N) if z == N else 0.0


def bayes_outputs(of, alpha, z, scale=plain_scale):
    """Outputs [V] of the network that knows the data's law."""
    law = np.maximum(DATA @ table(of, alpha), 1e-300)
    return np.log(law / law[z]) + scale(of, alpha, z)


def random_outputs(of, alpha, z):
    """A network of no sense, smooth in alpha."""
    a, b = np.random.default_rng(3).normal(size=(2, N + 1, N + 1)) * 0.7
    return a[z] + b[z] * alpha


def expected(terms, of, outputs, alpha_t, alpha_s, steps, weight):
    """[N] by x: the sum over the alphas of weight E_z of the loss's terms."""
    last = np.where((alpha_s == 1) & (alpha_t < 1), steps, 0)
    columns = np.stack([alpha_t, alpha_s, 0 * last, last, 0 * last, 0 * last, steps, weight])
    columns = np.pad(columns, ((0, 0), (0, ALPHAS - len(weight))), mode="edge")
    columns[-1, len(weight) :] = 0
    index, z, x = np.array(list(itertools.product(range(ALPHAS), range(N + (of.gamma < 1)), range(N)))).T
    logits = np.array([outputs(of, a, z_) for a, z_ in zip(columns[0, index], z, strict=True)])
    rows = Phase(*map(jnp.asarray, columns[:-1, index]))
    nats = sum(jitted(terms)(jnp.asarray(logits), jnp.asarray(x), jnp.asarray(z), rows).values())
    mass = np.array([table(of, a) for a in columns[0]])[index, x, z]
    return np.bincount(x, np.where(mass > 0, mass * columns[-1, index] * np.asarray(nats), 0))


def continuous_nelbo(terms, of, outputs, prior_x):
    """By quadrature over the noise fraction, with the prior's divergence; [N] by x."""
    u, w = np.polynomial.legendre.leggauss(ALPHAS)
    u, w = (u + 1) / 2, w / 2
    alpha = 1 - (1 - LEFT) * u**3
    return expected(terms, of, outputs, alpha, alpha, np.full(ALPHAS, 1 - LEFT), 3 * u**2 * w) + prior_x


def discrete_nelbo(terms, of, outputs, steps, prior_x):
    """Over all steps of flat, with the prior's divergence; [N] by x."""
    alpha, each = 1 - (1 - LEFT) * np.arange(steps, -1, -1) / steps, np.full(steps, float(steps))
    return expected(terms, of, outputs, alpha[:-1], alpha[1:], each, 1 / each) + prior_x


def prior(of, data):
    """KL(q_T(. | x) || prior) by x; the prior is that of a law of x."""
    q = table(of, LEFT)
    return np.array([oracle.kl(q[x], data @ q) for x in range(N)])


def model_law(of, outputs, steps):
    """[N]: the law of the text that the analytic sampler draws from even noise, by its tables."""
    kernel = jitted(reverse.analytic(process_of(of.gamma, N), "score").kernel)
    law_V, z = table(of, LEFT).mean(0), np.arange(N + 1)
    for pair in itertools.pairwise(1 - (1 - LEFT) * np.arange(steps, -1, -1) / steps):
        logits = np.array([outputs(of, pair[0], z_) for z_ in z])
        law_V = law_V @ np.asarray(kernel(z, logits, *(np.full(N + 1, alpha) for alpha in pair)))
    return law_V[:N]


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_the_bounds_are_tight_at_the_true_scores(gamma):
    """-log p(x) for every x: at continuous times, and for 1 and 3 discrete steps."""
    of, process = Clocks(N, gamma), process_of(gamma, N)
    with jax.enable_x64(True):
        flow = losses.build("score_entropy", process, continuous=True).terms
        steps = losses.bound(process, "score", False).terms
        same = prior(of, DATA)
        np.testing.assert_allclose(continuous_nelbo(flow, of, bayes_outputs, same), -np.log(DATA), atol=2e-5)
        for count in (1, 3):
            given = discrete_nelbo(steps, of, bayes_outputs, count, same)
            np.testing.assert_allclose(given, -np.log(DATA), atol=2e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_any_network_is_bounded_and_the_step_bound_tends_to_the_entropy(gamma):
    of, process = Clocks(N, gamma), process_of(gamma, N)
    with jax.enable_x64(True):
        bound, first_order = losses.bound(process, "score", False), losses.build("score_entropy", process)
        limit = continuous_nelbo(losses.bound(process, "score", True).terms, of, random_outputs, prior(of, EVEN))
        at = lambda terms, steps: discrete_nelbo(terms, of, random_outputs, steps, prior(of, EVEN))
        for steps in (1, 4):
            law = model_law(of, random_outputs, steps)
            assert law.sum() == pytest.approx(1)
            assert (at(bound.terms, steps) > -np.log(law) - 1e-6).all()
        error = {steps: np.abs(at(bound.terms, steps) - limit).max() for steps in (16, 64)}
        assert error[64] < 0.4 and error[64] < 0.5 * error[16]
        assert np.abs(at(first_order.terms, 64) - limit).max() < 0.5
    assert (bound.is_bound, first_order.is_bound, bound.reading) == (True, False, "score")
    assert losses.build("score_entropy", process, continuous=True).is_bound


def test_the_published_loss_is_no_bound():
    """With the true scores it falls below -log p(x), on average over the data."""
    of, process = Clocks(N, 0.4), process_of(0.4, N)
    loss = losses.build("published_score_entropy", process, continuous=True)
    with jax.enable_x64(True):
        below = continuous_nelbo(
            loss.terms, of, functools.partial(bayes_outputs, scale=published_scale), prior(of, DATA)
        )
    assert DATA @ below < DATA @ -np.log(DATA) - 0.1 and not loss.is_bound


def test_the_weights_are_the_time_that_a_draw_stands_for():
    """Of the phases as they are drawn: all of log(alpha) is covered once."""
    hs, step, u = hyperschedules.flat(1, 5), np.arange(5), np.array([0.2, 0.7])

    @jax.jit
    def weights(step, u):
        discrete = phases.at_step(step, 0 * step, 1, hs, LINEAR, 1.0)
        flowing = phases.continuous(u, 1, LINEAR, 1.0)
        return score_losses.sigma_weight(discrete, False)[:, 0], score_losses.sigma_weight(flowing, True)[:, 0]

    with jax.enable_x64(True):
        discrete, flowing = weights(step, u)
    alpha = 1 - (1 - LEFT) * np.arange(6) / 5
    np.testing.assert_allclose(discrete, 5 * np.log(alpha[:-1] / alpha[1:])[::-1], rtol=1e-12)
    np.testing.assert_allclose(flowing, (1 - LEFT) / (1 - (1 - LEFT) * u), rtol=1e-12)


def test_texts_at_0_plus_carry_the_reconstruction():
    """Where the schedule starts above 0: -log p(x | z) with the posterior of the scores."""
    process, of = noising.gamma_hybrid(N, 0.4), Clocks(N, 0.4)
    schedule = noise_schedules.geometric(0.05, 6.0)
    z, x = (grid.ravel() for grid in np.indices((N + 1, N)))
    outputs = np.random.default_rng(4).normal(size=(len(z), N + 1))

    @jax.jit
    def both(outputs, z, x):
        phase = jax.tree.map(lambda c: c[:, 0], phases.at_zero_plus((len(z), 1), schedule, process.alpha_max))
        sigma = jnp.full(len(z), 0.05)
        score = jnp.exp(scores.log_scores(of, outputs, z, sigma))
        return losses.bound(process, "score", True).terms(outputs, x, z, phase), scores.to_posterior(
            of, z, score, sigma
        )

    with jax.enable_x64(True):
        terms, p = both(outputs, z, x)
    np.testing.assert_allclose(terms["reconstruction"], -np.log(p[np.arange(len(z)), x]), rtol=1e-6)
    np.testing.assert_array_equal(terms["diffusion"], 0)


def phase_rows(rng, rows):
    """Continuous rows at every noise, discrete ones, last ones and settled ones."""
    alpha_t = np.concatenate([[1 - 1e-6, 1 - 1e-3, 1e-3, 1.0, 1.0], rng.uniform(0.01, 0.99, rows - 5)])
    alpha_s = np.concatenate([[1, 1, 0.5, 1.0, 1.0], alpha_t[5:] + rng.choice([0, 0.005], rows - 5)])
    steps = np.where(alpha_t == 1, 0.0, 3.0)
    last = np.where((alpha_s == 1) & (alpha_t < 1), 3.0, 0.0)
    zero = np.zeros(rows)
    return Phase(*(jnp.asarray(c, jnp.result_type(float)) for c in (alpha_t, alpha_s, steps, last, zero, zero, steps)))


@pytest.mark.parametrize("kind", ["score_entropy", "published_score_entropy", "bound"])
def test_gradients_are_those_of_finite_differences_and_finite_everywhere(kind):
    process, rng, rows = noising.gamma_hybrid(N, 0.3), np.random.default_rng(5), 24
    loss = losses.bound(process, "score") if kind == "bound" else losses.build(kind, process)
    z, x = rng.integers(0, N + 1, rows, np.int32), rng.integers(0, N, rows, np.int32)
    outputs, direction = rng.normal(size=(2, rows, N + 3))
    z[3:5], outputs[:, N:] = x[3:5], -np.inf
    direction[:, N:] = 0

    def total(outputs, phase):
        return sum(term.sum() for term in loss.terms(outputs, jnp.asarray(x), jnp.asarray(z), phase).values())

    with jax.enable_x64(True):
        phase = phase_rows(np.random.default_rng(6), rows)
        value = jax.jit(lambda step: total(outputs + step * direction, phase))
        slope = jax.grad(value)(0.0)
        assert slope == pytest.approx(float(value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-6)
    phase = phase_rows(np.random.default_rng(6), rows)
    gradient = jax.jit(jax.grad(total))(jnp.asarray(outputs, jnp.float32), phase)
    assert np.isfinite(gradient).all() and not gradient[3:5].any() and not gradient[:, N:].any()


def test_settled_tokens():
    """By token, or the mean of a text; only where the position is settled in this pass."""
    process, one, zero = noising.gamma_hybrid(N, 0.3), np.ones(4, np.float32), np.zeros(4, np.float32)
    alpha, steps = np.array([1, 1, 0.5, 0.5], np.float32), np.array([0, 0, 0, 4], np.float32)
    phase = Phase(alpha, one, zero, zero, zero + 2, zero + 4, steps)
    x, outputs = np.arange(4, dtype=np.int32), np.log(np.arange(1, 5, dtype=np.float32))[None] * one[:, None]
    nats = np.log(10) - np.log([1, 2, 3, 4])

    def settled(kind, weight):
        return jax.jit(losses.build(kind, process, settled_weight=weight).terms)(outputs, x, x, phase).get("settled")

    here = np.array([1, 1, 0, 0])
    np.testing.assert_allclose(settled("score_entropy", 0.5), 0.5 * nats * here, rtol=1e-6)
    np.testing.assert_allclose(settled("published_score_entropy", 0.5), 0.25 * nats * here, rtol=1e-6)
    assert settled("score_entropy", 0.0) is None
    with pytest.raises(UserError, match=r"loss.settled_weight: got -1.0"):
        settled("score_entropy", -1.0)


def test_losses_of_scores_are_refused_where_there_are_none():
    for kind, process in (
        ("score_entropy", noising.epsilon_hybrid(N, 0.1)),
        ("published_score_entropy", noising.absorb(N)),
    ):
        with pytest.raises(UserError, match=rf"loss.kind: got '{kind}'"):
            losses.build(kind, process)
