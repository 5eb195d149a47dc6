"""The discrete negative ELBO against the oracle, the enumerated model likelihood, and its limits."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from hdlm_jax.diffusion import hyperschedules, likelihood, losses, noise_schedules, noising, phases, reverse
from hdlm_jax.diffusion.likelihood import ReverseChain
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.errors import UserError
from tests.oracle import hdlm_oracle as oracle

N, L = 2, 3
LINEAR, GEOMETRIC = noise_schedules.linear(), noise_schedules.geometric(0.2, 1.5)
PROCESSES = {
    "absorb": (lambda: noising.absorb(N), oracle.Absorb(N)),
    "epsilon": (lambda: noising.epsilon_hybrid(N, 0.3), oracle.Epsilon(N, 0.3)),
    "gamma": (lambda: noising.gamma_hybrid(N, 0.3), oracle.Gamma(N, 0.3)),
    "uniform": (lambda: noising.uniform(N), oracle.Uniform(N)),
    "gidd": (lambda: noising.gidd(N, 0.3), oracle.gidd_hybrid(N, 0.3)),
}
TABLE = [[3, 3, 3], [1, 3, 3], [1, 2, 3], [0, 2, 1], [0, 0, 0]]  # waits and skips, right before middle
CASES = [
    ("absorb", hyperschedules.quenched(L), LINEAR),
    ("absorb", hyperschedules.slide(L, 2, "1/2"), LINEAR),
    ("epsilon", hyperschedules.flat(L, 3), GEOMETRIC),
    ("epsilon", hyperschedules.slide(L, 2, 1), LINEAR),
    ("epsilon", hyperschedules.block(L, 2, 1).with_prompt(1), GEOMETRIC),
    ("epsilon", hyperschedules.from_levels(TABLE), LINEAR),
    ("gamma", hyperschedules.block(L, 2, 1), LINEAR),
    ("uniform", hyperschedules.slide(L, 2, 1), GEOMETRIC),
    ("gidd", hyperschedules.slide(L, 2, 1), LINEAR),
]
IDS = [f"{process}-{hs.kind}-{schedule.name.split('(')[0]}" for process, hs, schedule in CASES]
FIRST = (0, 2, 4, 5)  # of CASES, in the first tier
EVERY_X0 = np.indices((N,) * L).reshape(L, -1).T


def chain_of(process, hs, schedule, reading="posterior"):
    return ReverseChain(hs, schedule, PROCESSES[process][0](), reading)


def times_of(chain):
    """The oracle's time of every level."""
    fraction = np.arange(chain.hs.tau_max + 1) / chain.hs.tau_max
    alpha = np.asarray(chain.schedule.alpha(jnp.asarray(fraction)))
    with np.errstate(divide="ignore"):
        times = 1 - alpha if chain.process.name == "gidd" else 0.0 - np.log(alpha)
    times[0] = 0.0
    return times


def network(chain, their_denoiser, levels):
    """Ours from theirs: their probabilities at every step, looked up by the noised text."""
    tables = [their_denoiser(times_of(chain)[level_L]) for level_L in levels[:-1]]
    no_mask = [(0, N + 1 - tables[0].shape[0])] * L + [(0, 0)] * 2  # uniform has no text with a mask in it
    tables = np.stack([np.pad(table, no_mask, constant_values=1 / N) for table in tables])
    place_V = (N + 1) ** np.arange(L - 1, -1, -1)

    def denoiser(step, zt_BxL):
        flat = jnp.asarray(tables.reshape(len(tables), -1, L, N), jnp.result_type(float))
        return flat[step, (zt_BxL * place_V[None]).sum(-1)]

    return denoiser


def all_terms(chain, denoiser):
    """The terms of every text, [texts, L] each, in float64."""
    return jax.jit(jax.vmap(lambda x0_L: likelihood.nelbo(chain, denoiser, x0_L)))(jnp.asarray(EVERY_X0))


@pytest.mark.parametrize(
    ("process", "hs", "schedule"),
    [
        pytest.param(*case, id=name, marks=[] if i in FIRST else [pytest.mark.slow])
        for i, (case, name) in enumerate(zip(CASES, IDS, strict=True))
    ],
)
def test_equals_the_oracle_and_bounds_the_model_likelihood(process, hs, schedule):
    theirs = PROCESSES[process][1]
    their_denoiser = oracle.random_denoiser(theirs, L, np.random.default_rng(5))
    levels = np.asarray(hs.levels)
    with jax.enable_x64(True):
        chain = chain_of(process, hs, schedule)
        times = times_of(chain)
        ours = jax.tree.map(np.asarray, all_terms(chain, network(chain, their_denoiser, levels)))
    given = levels[0] == 0
    settles = (levels[1:] == 0) & (levels[:-1] > 0)
    for i, x0_L in enumerate(EVERY_X0):
        total, parts = oracle.hyper_nelbo(theirs, times, levels, x0_L, their_denoiser)
        # a given position has no noise, so no prior; theirs averages over x at level 0 too
        priors = [
            oracle.prior_kl(theirs, times[t], x, oracle.default_prior(theirs, times[t]))
            for t, x in zip(levels[0], x0_L, strict=True)
        ]
        np.testing.assert_allclose(ours.prior[i], np.where(given, 0, priors), atol=1e-12)
        np.testing.assert_allclose(ours.diffusion[i], np.where(settles, 0, parts["diff"]).sum(0), atol=1e-12)
        np.testing.assert_allclose(ours.last[i], np.where(settles, parts["diff"], 0).sum(0), atol=1e-12)
        np.testing.assert_allclose(ours.total[i].sum(), total - np.where(given, priors, 0).sum(), atol=1e-12)
    model = oracle.model_likelihood(theirs, times, levels, their_denoiser)
    if not given.any():
        np.testing.assert_allclose(model.sum(), 1, atol=1e-12)
        assert (ours.total.sum(1) >= -np.log(model[tuple(EVERY_X0.T)]) - 1e-12).all()


def read(theirs, reading, raw):
    """The oracle's denoiser for raw network probabilities [(states,) * L, L, N] under a reading."""

    def denoiser(times_L):
        p = raw.copy()
        for i, t in enumerate(times_L):
            z, own = oracle.grid(theirs, L)[i], raw[..., i, :]
            if reading == "hybrid":
                own = own / (np.eye(theirs.K, N)[z] + 1 / N)
            happens = oracle.evidence(theirs, t, z).any(-1)  # a settled token is no mask, pure noise nothing else
            z = np.where(happens, z, 0 if t == 0 else N)
            p[..., i, :] = oracle.cavity_to_posterior(theirs, t, z, own)
        return p

    return denoiser


@pytest.mark.parametrize("reading", ["cavity", "hybrid"])
def test_a_network_is_taken_by_its_reading(reading):
    theirs, hs = PROCESSES["epsilon"][1], hyperschedules.slide(L, 2, 1)
    raw = softmax(np.random.default_rng(2).normal(size=(N + 1,) * L + (L, N)), -1)
    levels, x0_L = np.asarray(hs.levels), np.array([1, 0, 1])
    with jax.enable_x64(True):
        chain = chain_of("epsilon", hs, LINEAR, reading)
        denoiser = network(chain, lambda times_L: raw, levels)
        ours = jax.jit(lambda x0_L: likelihood.nelbo(chain, denoiser, x0_L).total.sum())(jnp.asarray(x0_L))
    their_total, _ = oracle.hyper_nelbo(theirs, times_of(chain), levels, x0_L, read(theirs, reading, raw))
    np.testing.assert_allclose(ours, their_total, atol=1e-12)


@pytest.fixture(scope="module")
def timeless():
    """A network that does not look at the noise level: probabilities by noised text, and as a denoiser."""
    raw = softmax(np.random.default_rng(8).normal(size=((N + 1) ** L, L, N)), -1)
    place_V = (N + 1) ** np.arange(L - 1, -1, -1)
    return raw, lambda step, zt_BxL: jnp.asarray(raw, jnp.result_type(float))[(zt_BxL * place_V[None]).sum(-1)]


def test_one_position_at_a_time_is_the_chain_rule_exactly(timeless):
    raw, denoiser = timeless
    x0_L, m = np.array([1, 0, 1]), N
    seen = [(m, m, m), (1, m, m), (1, 0, m)]  # quenched: what each position's call is fed
    chain_rule = [-np.log(raw.reshape((N + 1,) * L + (L, N))[z][i, x0_L[i]]) for i, z in enumerate(seen)]
    with jax.enable_x64(True):
        for hs in (hyperschedules.quenched(L), hyperschedules.block(L, 1, 1)):
            chain = chain_of("absorb", hs, LINEAR)
            terms = jax.jit(lambda x0_L, chain=chain: likelihood.nelbo(chain, denoiser, x0_L))(jnp.asarray(x0_L))
            np.testing.assert_allclose(terms.last, chain_rule, rtol=1e-12)
            assert not terms.prior.any() and not terms.diffusion.any()


def test_flat_tends_to_the_continuous_masked_diffusion_bound(timeless):
    raw, denoiser = timeless
    theirs, x0_L = oracle.Absorb(N), np.array([1, 0, 1])
    table = raw.reshape((N + 1,) * L + (L, N))

    def per_fraction(u):
        sigma = -np.log1p(-u)
        integrand = oracle.ct_integrand(theirs, sigma, x0_L, lambda _: table, oracle.absorb_nelbo_integrand)
        return integrand / (1 - u)  # d sigma / du

    continuous = oracle.quad(per_fraction, 0, 1)
    with jax.enable_x64(True):
        of_steps = {}
        for steps in (16, 256, 1024):
            chain = chain_of("absorb", hyperschedules.flat(L, steps), LINEAR)
            exact = jax.jit(lambda x0_L, chain=chain: likelihood.nelbo(chain, denoiser, x0_L).total.sum())
            of_steps[steps] = float(exact(jnp.asarray(x0_L)))
    error = {steps: abs(value - continuous) for steps, value in of_steps.items()}
    assert 5 * error[256] < error[16] and 3.8 * error[1024] < error[256]
    np.testing.assert_allclose((4 * of_steps[1024] - of_steps[256]) / 3, continuous, atol=1e-5)


def test_one_draw_per_step_is_unbiased(timeless):
    _, denoiser = timeless
    x0_L, draws = jnp.array([1, 0, 1]), 4096
    chain = chain_of("epsilon", hyperschedules.slide(L, 2, 1), LINEAR, "cavity")
    exact = jax.jit(lambda x0_L: likelihood.nelbo(chain, denoiser, x0_L))(x0_L)
    sampled = jax.jit(lambda rng, x0_BxL: likelihood.sampled_nelbo(rng, chain, denoiser, x0_BxL))
    drawn = sampled(jax.random.key(3), jnp.broadcast_to(x0_L, (draws, L)))
    for ours, theirs in zip(drawn, exact, strict=True):
        ours = np.asarray(ours, np.float64)
        assert (np.abs(ours.mean(0) - theirs) <= 4 * ours.std(0) / draws**0.5 + 1e-5).all()


def test_texts_of_another_length_or_too_many_are_refused(timeless):
    chain = chain_of("absorb", hyperschedules.quenched(L), LINEAR)
    with pytest.raises(UserError, match=r"text: got '2 tokens'; allowed: the hyperschedule's 3 positions"):
        likelihood.nelbo(chain, timeless[1], jnp.array([0, 1]))
    with pytest.raises(UserError, match=r"text: got '2 tokens'"):
        likelihood.sampled_nelbo(jax.random.key(0), chain, timeless[1], jnp.array([[0, 1]]))
    long = chain_of("absorb", hyperschedules.quenched(20), LINEAR)
    with pytest.raises(UserError, match=r"text: got '20 tokens'; allowed: at most 1,048,576 noised texts .* 3 \*\* 20"):
        likelihood.nelbo(long, timeless[1], jnp.zeros(20, jnp.int32))


# ---- every process under every hyperschedule: 3 tokens, 3 positions, everything enumerated

EVERY_PROCESS = {
    "absorb": noising.absorb(3),
    "uniform": noising.uniform(3),
    "gamma": noising.gamma_hybrid(3, 0.3),
    "epsilon": noising.epsilon_hybrid(3, 0.3),
    "gidd": noising.gidd(3, 0.3),
    "band": noising.d3pm_band(3, 1),
    "nearest": noising.d3pm_nearest(3),
}
EVERY_ORDER = {
    "quenched": hyperschedules.quenched(L),
    "flat": hyperschedules.flat(L, 2),
    "block": hyperschedules.block(L, 2, 1),
    "slide": hyperschedules.slide(L, 2, 1),
    "slow slide": hyperschedules.slide(L, 2, "1/2"),
    "block_slide": hyperschedules.block_slide(L, 2, 2, 1),
    "line": hyperschedules.ar_diffusion(L, 7),
    "table": hyperschedules.from_levels(TABLE),
}
STEPS = 10  # each order is filled up with steps in which no level falls: one compiled program serves all


def filled_up(process, hs, schedule):
    """Levels and survivals [STEPS + 1, L]."""
    levels = np.pad(np.asarray(hs.levels), ((0, STEPS - hs.num_steps), (0, 0)))
    return levels, phases.survival(jnp.asarray(levels), hs.tau_max, schedule, process.alpha_max)


def as_chain(process, levels, alphas):
    hs = SimpleNamespace(length=L, num_steps=STEPS, levels_at=lambda step: levels[step])
    return SimpleNamespace(hs=hs, process=process, reading=process.reading, alpha=lambda step: alphas[step])


def law_of_texts(process, kernel, alphas, raw):
    """[V, V, V]: the law of the finished text, by pushing that of z through the kernels of every step."""
    zt_ZxL = jnp.asarray(np.indices((process.num_states,) * L).reshape(L, -1).T)
    of_position = jax.vmap(lambda alpha: jax.vmap(process.marginal, (0, None))(jnp.arange(3), alpha).mean(0))
    tables = jax.vmap(jax.vmap(kernel, (0, 0, 0, 0)), (0, 0, None, None))

    def one(law_VxVxV, step):
        alpha_t, alpha_s = alphas[step], alphas[step + 1]
        moved = tables(zt_ZxL, raw[step], alpha_t, alpha_s)
        moved = jnp.where((alpha_s > alpha_t)[None, :, None], moved, jax.nn.one_hot(zt_ZxL, process.num_states))
        return jnp.einsum("z,za,zb,zc->abc", law_VxVxV.ravel(), moved[:, 0], moved[:, 1], moved[:, 2]), None

    first = jnp.einsum("a,b,c->abc", *of_position(alphas[0]))
    return jax.lax.scan(one, first, jnp.arange(STEPS))[0]


def corrected_nelbo(chain, eta, levels, raw, x0_L):
    """The bound of the chain that corrects, from the terms that evaluation sums."""
    process, zt_ZxL = chain.process, jnp.asarray(np.indices((chain.process.num_states,) * L).reshape(L, -1).T)
    loss, Z = losses.acs_bound(process, eta, process.reading), len(zt_ZxL)

    def at(step):
        alpha_t, alpha_s, falls = chain.alpha(step), chain.alpha(step + 1), levels[step + 1] < levels[step]
        weight = jnp.where(falls, (alpha_s - alpha_t) / jnp.where(falls, 1 - alpha_t, 1), 0.0)
        fields = alpha_t, alpha_s, weight, falls & (levels[step + 1] == 0), 0 * alpha_t, 0 * alpha_t, falls
        phase = Phase(*(jnp.tile(jnp.asarray(x, float), Z) for x in fields))
        scores = jnp.pad(jnp.log(raw[step].reshape(Z * L, 3)), ((0, 0), (0, 1)), constant_values=-jnp.inf)
        nats = sum(loss.terms(scores, jnp.tile(x0_L, Z), zt_ZxL.ravel(), phase).values()).reshape(Z, L).sum(1)
        law_LxV = jax.vmap(process.marginal)(x0_L, alpha_t)
        chance_Z = jnp.take_along_axis(law_LxV[None], zt_ZxL[..., None], -1)[..., 0].prod(1)
        return jnp.where(chance_Z > 0, chance_Z * nats, 0.0).sum()

    return jax.lax.map(at, jnp.arange(STEPS)).sum() + likelihood.prior_terms(chain, x0_L).sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "eta"), [*((name, None) for name in EVERY_PROCESS), ("epsilon", 0.5), ("epsilon", 1.0)]
)
def test_no_bound_is_ever_violated(name, eta):
    """Random networks: -log p(x) of the texts that are drawn is below the bound, for every x and hyperschedule.

    Masks give one position at a time nothing to lose: there the bound is the likelihood.
    """
    process = EVERY_PROCESS[name]
    V, texts = process.num_states, np.indices((3,) * L).reshape(L, -1).T
    kernel = lambda z, p, alpha_t, alpha_s: process.reverse(z, p, alpha_t, alpha_s, process.reading)
    kernel = kernel if eta is None else reverse.acs(process, eta, process.reading).kernel

    @jax.jit
    def both(levels, alphas, raw):
        chain = as_chain(process, levels, alphas)
        denoiser = lambda step, zt_BxL: raw[step][(zt_BxL * V ** jnp.arange(L - 1, -1, -1)[None]).sum(-1)]
        if eta is None:
            of_text = lambda x0_L: likelihood.nelbo(chain, denoiser, x0_L).total.sum()
        else:
            of_text = lambda x0_L: corrected_nelbo(chain, eta, levels, raw, x0_L)
        return jax.lax.map(of_text, jnp.asarray(texts)), law_of_texts(process, kernel, alphas, raw)

    rng = np.random.default_rng(9)
    with jax.enable_x64(True):
        for (order, hs), schedule in itertools.product(EVERY_ORDER.items(), (LINEAR, GEOMETRIC)):
            raw = jnp.asarray(rng.dirichlet(np.ones(3), (STEPS, V**L, L)))
            nelbo, law = (np.asarray(x) for x in both(*filled_up(process, hs, schedule), raw))
            np.testing.assert_allclose(law[:3, :3, :3].sum(), 1, atol=1e-9, err_msg=order)
            gap = nelbo + np.log(law[tuple(texts.T)])
            assert (gap >= -1e-9).all() and gap.max() < 50, (order, schedule.name, gap.min(), gap.max())
            exact = process.mask is not None and order == "quenched" and schedule is LINEAR
            assert (gap.max() < 1e-9) == exact, (order, schedule.name, gap.max())
