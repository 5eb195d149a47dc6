"""The bound of any process: float32 against closed forms, gradients where they could break, limits, tightness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from hdlm_jax.diffusion import bounds, hyperschedules, likelihood, losses, noise_schedules, noising
from hdlm_jax.diffusion.likelihood import ReverseChain
from hdlm_jax.diffusion.phases import Phase
from tests.oracle import hdlm_oracle as oracle

N = 5
READINGS = ("cavity", "posterior")
PROCESSES = {
    "uniform": noising.uniform(N),
    "gamma": noising.gamma_hybrid(N, 0.3),
    "gidd": noising.gidd(N, 0.2),
    "band": noising.d3pm_band(N, 2),
    "nearest": noising.d3pm_nearest(N),
}


def closed_form(gamma, sigma, z, x, p, reading):
    """(per unit of sigma, sum of absolute terms) of one position of the gamma hybrid, in float64.

    At a mask (1 - g)/(e^{(1-g) sigma} - 1) KL(x~ || p~), v~ = f v + (1 - f)/N, f = e^{-g sigma}; at a token
    (g/N) sum_{y != z} s_y - r_y log s_y + r_y (log r_y - 1).
    """
    n = len(p)
    if z == n:
        f = np.exp(-gamma * sigma)
        target, model = f * (np.arange(n) == x) + (1 - f) / n, f * p + (1 - f) / n
        weight = (1 - gamma) / np.expm1((1 - gamma) * sigma)
        terms = np.stack([target * np.log(target / model), model - target])
    else:
        kappa, others = n / np.expm1(gamma * sigma), np.arange(n) != z
        s = (kappa * p + 1) / (kappa * p[z] + 1) if reading == "cavity" else kappa * p + 1 - p[z] * kappa / (1 + kappa)
        r = np.full(n, 1 / (1 + kappa)) if z == x else 1 + kappa * (np.arange(n) == x)
        weight, terms = gamma / n, np.stack([s, -r * np.log(s), r * (np.log(r) - 1)])[:, others]
    return weight * terms.sum(), weight * np.abs(terms).sum()


@pytest.mark.parametrize(("num_tokens", "tolerance"), [(8, 1e-6), (50257, 1e-5)])
def test_closed_forms_hold_in_float32(num_tokens, tolerance):
    """Relative to the sum of absolute terms, at sigma 2e-3 .. 7, for flat and for sharper predictions."""
    rng, R = np.random.default_rng(0), 12
    of = {1.0: noising.uniform(num_tokens), 0.5: noising.gamma_hybrid(num_tokens, 0.5)}
    of[0.01] = noising.gamma_hybrid(num_tokens, 0.01)
    peak = np.repeat([[0.5], [3.0]], R // 2, 0)
    scores = (rng.normal(size=(R, num_tokens)) * peak).astype(np.float32)
    alpha = np.exp(-np.geomspace(2e-3, 7, R)[rng.permutation(R)]).astype(np.float32)
    sigma = -np.log(alpha.astype(float))
    x0 = rng.integers(0, num_tokens, R)
    zt = np.where(np.arange(R) % 3 == 0, x0, rng.integers(0, num_tokens, R))
    probs = softmax(scores.astype(float), -1)
    for gamma, process in of.items():
        zt = np.where((np.arange(R) % 3 == 2) & (gamma < 1), num_tokens, zt)
        for reading in READINGS if num_tokens == 8 or gamma == 0.5 else READINGS[:1]:
            ours = jax.jit(lambda *rows, p=process, r=reading: bounds.integrand(p, r, *rows))
            ours = ours(np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf), x0, zt, alpha) * alpha
            rows = zip(sigma, zt, x0, probs, strict=True)
            theirs, total = np.transpose([closed_form(gamma, *row, reading) for row in rows])
            assert (np.abs(ours - theirs) < tolerance * total).all()
            if num_tokens == 8:
                form = oracle.gamma_nelbo_integrand_cavity if reading == "cavity" else oracle.gamma_nelbo_integrand
                known = [form(gamma, *row) for row in zip(sigma, zt[:, None], x0[:, None], probs[:, None], strict=True)]
                np.testing.assert_allclose(theirs, np.concatenate(known), rtol=1e-6, atol=1e-9)


def test_divergences_of_close_laws_do_not_cancel():
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(1000, 0.1), 4)
    q = p * np.exp(1e-3 * rng.normal(size=p.shape))
    q /= q.sum(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.nan_to_num(p * np.log(p / q)).sum(-1)
    close = bounds.divergence(jnp.asarray(p, jnp.float32), jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(close, exact, rtol=2e-3)
    assert float(bounds.divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))) == pytest.approx(87.3, abs=0.1)


def rows_of_every_sort(process):
    """(x0, zt, phase) of rows of every kind: in the middle, last, settled, worthless, waiting, and mere filling."""
    steps = [(0.0, 0.25), (0.25, 0.75), (0.5, 1.0), (1.0, 1.0), (0.0, 0.0), (0.5, 0.5), (1 - 2e-7, 1.0), (0.0, 1.0)]
    alpha_t, alpha_s = np.repeat(np.array(steps, np.float32), 3, 0).T
    sample = jax.vmap(process.sample, (0, 0, 0))
    x0 = jnp.asarray(np.arange(len(alpha_t)) % N, jnp.int32)
    zt = sample(jax.random.split(jax.random.key(0), len(x0)), x0, jnp.asarray(alpha_t))
    last = np.where((alpha_s == 1) & (alpha_t < 1), 8.0, 0.0)
    falls = np.where(alpha_s > alpha_t, 8.0, 0.0)
    filling = [np.zeros(1, np.float32)] * 7
    phase = [alpha_t, alpha_s, falls, last, x0, x0, falls]
    phase = Phase(*(jnp.asarray(np.concatenate(pair), jnp.float32) for pair in zip(phase, filling, strict=True)))
    return jnp.append(x0, 0), jnp.append(zt, 0), phase


@pytest.mark.parametrize("name", PROCESSES)
def test_terms_and_gradients_are_finite_on_rows_of_every_sort(name):
    """For scores of 0, as a network starts, and for such as an over-confident one gives, wrong and right."""
    process = PROCESSES[name]
    x0, zt, phase = rows_of_every_sort(process)
    rng = np.random.default_rng(2)
    for continuous in (False, True) if process.name in bounds.CONTINUOUS else (False,):
        rows = phase if not continuous else phase._replace(last_weight=jnp.where(phase.alpha_s == 1, 8.0, 0.0))
        for reading in READINGS:
            terms = bounds.terms(process, reading, continuous)

            def both(scores, terms=terms, rows=rows):
                scores = jnp.pad(scores, ((0, 0), (0, 2)), constant_values=-jnp.inf)
                out = terms(scores, x0, zt, rows)
                return sum(x.sum() for x in out.values()), out

            run = jax.jit(jax.value_and_grad(both, has_aux=True))
            for size in (0.0, 3.0, 60.0, 300.0):
                (_, out), gradient = run(jnp.asarray(size * rng.normal(size=(len(x0), N)), jnp.float32))
                assert all(bool(jnp.isfinite(x).all()) and float(x.min()) >= -1e-5 for x in out.values())
                assert bool(jnp.isfinite(gradient).all())
                assert not gradient[9:12].any() and not gradient[-1].any()  # settled rows, and filling


BYTES = {"band": lambda: noising.d3pm_band(257, 64), "nearest": lambda: noising.d3pm_nearest(257)}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", BYTES)
def test_gradients_over_bytes_are_those_of_float64_differences(name, reading):
    """Where most displacements are rare; finite for an over-confident network too."""
    process, rng, R, levels = BYTES[name](), np.random.default_rng(8), 24, 64
    level = np.append(np.arange(1, levels, 3), [1, levels, levels])[:R]
    alpha_t, alpha_s = (np.asarray(1 - (1 - 1e-4) * l / levels, np.float32) for l in (level, level - 1))
    x0 = jnp.asarray(rng.integers(0, 257, R), jnp.int32)
    zt = jax.vmap(process.sample)(jax.random.split(jax.random.key(0), R), x0, jnp.asarray(alpha_t))
    along = rng.normal(size=(R, 257))

    def nats(scores_RxN, dtype):
        full = lambda value: jnp.asarray(np.broadcast_to(value, R), dtype)
        phase = Phase(full(alpha_t), full(alpha_s), full(0), full(alpha_s == 1), full(0), full(0), full(levels))
        scores_RxV = jnp.pad(scores_RxN, ((0, 0), (0, 2)), constant_values=-jnp.inf)
        return sum(bounds.terms(process, reading, False)(scores_RxV, x0, zt, phase).values())

    gradient = jax.jit(jax.grad(lambda scores: nats(scores, jnp.float32).sum()))
    for size in (60.0, 300.0):
        assert bool(jnp.isfinite(gradient(jnp.asarray(size * along, jnp.float32))).all())
    for scores in (np.zeros(along.shape), rng.normal(size=along.shape)):
        scores = scores.astype(np.float32)
        ours = (np.asarray(gradient(jnp.asarray(scores)), float) * along).sum(-1)
        with jax.enable_x64(True):
            exact = jax.jit(lambda scores: nats(scores, jnp.float64))
            later, before = (np.asarray(exact(scores.astype(float) + h * along)) for h in (1e-4, -1e-4))
        np.testing.assert_allclose(ours, (later - before) / 2e-4, rtol=1e-4, atol=1e-4)


def test_a_gamma_of_0_and_an_epsilon_of_0_are_absorb():
    rng, R = np.random.default_rng(3), 40
    absorb, gamma = noising.absorb(N), noising.gamma_hybrid(N, 0.0)
    x0, zt = rng.integers(0, N, R), np.full(R, N)
    scores = jnp.asarray(np.pad(rng.normal(size=(R, N)), ((0, 0), (0, 1)), constant_values=-np.inf), jnp.float32)
    at = jnp.asarray(rng.uniform(0.05, 0.5, R), jnp.float32)
    a_s = jnp.where(jnp.arange(R) % 4 == 0, 1.0, at + 0.3)
    last = jnp.where(a_s == 1, 7.0, 0.0)
    phase = Phase(at, a_s, 7 * (a_s - at) / (1 - at), last, x0, x0, jnp.full(R, 7.0))
    of = lambda terms: jax.tree.map(np.asarray, jax.jit(terms)(scores, jnp.asarray(x0), jnp.asarray(zt), phase))
    exact = of(losses.bound(absorb, "posterior").terms)
    for process in (gamma, noising.epsilon_hybrid(N, 0.0)):
        for name, x in of(losses.bound(process, "cavity").terms).items():
            np.testing.assert_array_equal(x, exact[name])
    for terms in (bounds.terms(gamma, "cavity", False), losses.epsilon_nelbo(noising.epsilon_hybrid(N, 0.0)).terms):
        for name, x in of(terms).items():
            np.testing.assert_allclose(x, exact[name], rtol=1e-5, atol=1e-6)
    nearly = of(bounds.terms(noising.gamma_hybrid(N, 1e-5), "cavity", False))
    np.testing.assert_allclose(sum(nearly.values()), sum(exact.values()), rtol=1e-3)
    continuous = phase._replace(alpha_s=at, last_weight=0 * at, mask_weight=7 / (1 - at))
    ours = bounds.terms(gamma, "posterior", True)(scores, jnp.asarray(x0), jnp.asarray(zt), continuous)
    theirs = losses.absorb_nelbo(absorb).terms(scores, jnp.asarray(x0), jnp.asarray(zt), continuous)
    np.testing.assert_allclose(ours["diffusion"], theirs["diffusion"], rtol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["uniform", "gamma", "gidd"])
def test_many_short_steps_tend_to_continuous_times(name, reading):
    """steps x KL over [alpha, alpha + 1/steps] tends to the integrand at alpha, at every state."""
    process, rng = PROCESSES[name], np.random.default_rng(4)
    zt, x0 = (grid.ravel() for grid in np.indices((N + (name != "uniform"), N)))
    with jax.enable_x64(True):
        scores = jnp.asarray(np.pad(rng.normal(size=(len(x0), N)), ((0, 0), (0, 1)), constant_values=-np.inf))
        zt, x0, alpha = jnp.asarray(zt), jnp.asarray(x0), jnp.full(len(x0), 0.4)
        exact = jax.jit(lambda: bounds.integrand(process, reading, scores, x0, zt, alpha))()
        divergence = jax.jit(lambda later: bounds.step_divergence(process, reading, scores, x0, zt, alpha, later))
        short = lambda steps: steps * divergence(alpha + 1 / steps)
        error = [np.abs(np.asarray(short(steps) - exact)) for steps in (1e3, 1e4)]
        assert (error[1] < 0.11 * error[0] + 1e-9).all()
        np.testing.assert_allclose(2 * short(2e4) - short(1e4), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", PROCESSES)
def test_one_position_with_the_true_posterior_is_tight(name, steps):
    """NELBO(x) = -log p(x) for every x: the network gives p(x), the law of a position that sees nothing else."""
    process, rng = PROCESSES[name], np.random.default_rng(5)
    schedule = noise_schedules.clipped(noise_schedules.linear(), 0.02) if steps == 3 else noise_schedules.linear()
    p_N = rng.dirichlet(np.ones(N))
    with jax.enable_x64(True):
        chain = ReverseChain(hyperschedules.flat(1, steps), schedule, process, "cavity")
        denoiser = lambda step, zt_BxL: jnp.broadcast_to(jnp.asarray(p_N), (*zt_BxL.shape, N))
        total_N = jax.jit(jax.vmap(lambda x: likelihood.nelbo(chain, denoiser, x[None]).total.sum()))(jnp.arange(N))
        # the prior is that of a uniform x; the bound is tight with the law of q_T under p
        alpha = float(chain.alpha(0)[0])
        q_NxV = np.asarray(jax.vmap(lambda x: process.marginal(x, alpha))(jnp.arange(N)))
        mismatch = np.log((p_N @ q_NxV).clip(1e-300) / q_NxV.mean(0).clip(1e-300))
        np.testing.assert_allclose(total_N - q_NxV @ mismatch, -np.log(p_N), atol=1e-10)
        prior_N = losses.prior_kl(process, alpha, jnp.arange(N))
        np.testing.assert_allclose(prior_N, [oracle.kl(q_V, q_NxV.mean(0)) for q_V in q_NxV], atol=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("reading", READINGS)
def test_the_terms_of_a_step_are_those_of_the_exact_twin(name, reading):
    """Every process, float32 against float64, over every state, discrete steps and last ones."""
    process, rng = PROCESSES[name], np.random.default_rng(6)
    zt, x0 = (grid.ravel() for grid in np.indices((N + (process.mask is not None), N)))
    chain = ReverseChain(hyperschedules.flat(1, 4), noise_schedules.linear(), process, reading)
    scores = np.pad(rng.normal(size=(len(x0), N)) * 2, ((0, 0), (0, 2)), constant_values=-np.inf)
    with jax.enable_x64(True):
        probs = lambda step, zt_BxL: jnp.asarray(softmax(scores[:, None, :N], -1))
        columns = jnp.asarray(x0)[:, None], jnp.asarray(zt)[:, None]
        twin = jax.jit(lambda step: likelihood.step_terms(chain, probs, step, *columns))
        exact = [jax.tree.map(np.asarray, twin(step)) for step in range(4)]
    terms = jax.jit(bounds.terms(process, reading, False))
    full = lambda value: jnp.full(len(x0), value, jnp.float32)
    scores, x0, zt = jnp.asarray(scores, jnp.float32), jnp.asarray(x0), jnp.asarray(zt)
    for alpha_t, (diffusion, last) in zip((0.0, 0.25, 0.5, 0.75), exact, strict=True):
        possible = np.asarray(jax.vmap(process.marginal, (0, None))(jnp.arange(N), alpha_t))[x0, zt] > 0
        weight = full(3.0 * (alpha_t == 0.75))
        phase = Phase(full(alpha_t), full(alpha_t + 0.25), full(0), weight, full(0), full(0), full(3.0))
        ours = terms(scores, x0, zt, phase)
        for name, theirs in (("diffusion", diffusion), ("reconstruction", last)):
            np.testing.assert_allclose(ours[name][possible], 3 * theirs[possible, 0], rtol=2e-5, atol=2e-6)
