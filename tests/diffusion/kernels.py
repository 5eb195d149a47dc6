"""Tables of noising processes, ours and the oracle's, and the checks that every process must pass."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import chisquare

from hdlm_jax.diffusion import hyperschedules, likelihood, noising
from hdlm_jax.diffusion.likelihood import ReverseChain
from tests.oracle import hdlm_oracle as oracle


def time_of(process, alpha):
    """The oracle's time at a survival: sigma, and its 0+ for the atom; GIDD's own is 1 - alpha."""
    if process.name == "gidd":
        return 1 - alpha
    if process.alpha_max <= alpha < 1:
        return oracle.ZERO_PLUS
    return np.inf if alpha == 0 else 0.0 - math.log(alpha)


def alpha_pairs(process, rng, count=24):
    """(alpha_t, alpha_s) as exact float32 values: all over (0, 1), near its ends, at them and at the atom."""
    low, high = np.sort(rng.uniform(0, 1, (2, count)), axis=0)
    near = 10.0 ** rng.uniform(-6, -2, (2, count // 4))
    ends = [
        (0.0, 1.0),
        (0.0, 0.4),
        (0.6, 1.0),
        (0.0, 1e-6),
        (0.3, process.alpha_max),
        (process.alpha_max, 1.0),
    ]
    pairs = [*zip(low, high, strict=True), *zip(1 - near[0] - near[1], 1 - near[0], strict=True), *ends]
    return np.array([pair for pair in pairs if pair[0] < pair[1]], np.float32).astype(float)


def grid(process, marginal_table, rng):
    """Every (alpha pair, zt, x0) that can happen, with random x0 probabilities; marginal_table: alpha -> [N, K]."""
    rows = []
    for alpha_t, alpha_s in alpha_pairs(process, rng):
        possible = marginal_table(alpha_t).T > 0
        rows += [(alpha_t, alpha_s, zt, x0) for zt, x0 in zip(*np.nonzero(possible), strict=True)]
    alpha_t, alpha_s, zt, x0 = (np.array(column) for column in zip(*rows, strict=True))
    return alpha_t, alpha_s, zt, x0, rng.dirichlet(np.full(process.num_tokens, 0.5), len(zt))


def our_tables(process, dtype, alpha_t, alpha_s, zt, x0, probs):
    """All tables of the grid's rows, in float `dtype`."""

    def tables(at, a_s, z, x, p):
        of_reading = {r: process.reverse(z, p, at, a_s, r) for r in process.readings}
        posteriors = {f"p({r})": noising.to_posterior(process, z, p, at, r) for r in process.readings}
        return {
            "marginal": process.marginal(x, at),
            "transition": process.transition(z, a_s, at),
            "likelihood": process.likelihood(z, at),
            "posterior": process.posterior(z, x, at, a_s),
            **{f"reverse({r})": table for r, table in of_reading.items()},
            **posteriors,
        }

    floats = (jnp.asarray(v, dtype) for v in (alpha_t, alpha_s))
    out = jax.jit(jax.vmap(tables))(*floats, jnp.asarray(zt), jnp.asarray(x0), jnp.asarray(probs, dtype))
    assert {table.dtype for table in out.values()} == {jnp.dtype(dtype)}
    return {name: np.asarray(table, float) for name, table in out.items()}


def their_tables(process, chain, alpha_t, alpha_s, zt, x0, probs):
    """The same tables from the oracle, with V columns."""
    N, rows = process.num_tokens, []
    for at, a_s, z, x, p in zip(alpha_t, alpha_s, zt, x0, probs, strict=True):
        t, s = time_of(process, at), time_of(process, a_s)
        of_reading = {
            "posterior": oracle.restrict(chain, t, z, p),
            "cavity": oracle.cavity_to_posterior(chain, t, z, p),
            "hybrid": oracle.cavity_to_posterior(chain, t, z, p / ((np.arange(N) == z) + 1 / N)),
        }
        states = chain.K
        row = {
            "marginal": oracle.marginal_table(chain, t)[x],
            "transition": oracle.transition_matrix(chain, s, t)[z] if z < states else np.eye(N + 1)[z],
            "likelihood": oracle.evidence(chain, t, np.asarray(z)),
            "posterior": oracle.posterior(chain, s, t, z, x),
        }
        for reading in process.readings:
            row[f"p({reading})"] = of_reading[reading]
            row[f"reverse({reading})"] = oracle.reverse_kernel(chain, s, t, z, of_reading[reading])
        row["reverse(cavity)"] = oracle.reverse_kernel_plugin(chain, s, t, z, p)
        rows.append(row)
    return stacked(rows, N)


def stacked(rows, N):
    """Rows of tables as arrays by name, filled up with zeros to N or N + 1 columns."""
    width = {name: N if name.startswith("p(") or name == "likelihood" else N + 1 for name in rows[0]}
    padded = lambda table, V: np.pad(table, (0, V - len(table)))
    return {name: np.array([padded(row[name], V) for row in rows]) for name, V in width.items()}


def check_agreement(ours, theirs, tolerance):
    """Every table of `theirs` is within `tolerance` of ours."""
    assert ours.keys() == theirs.keys()
    errors = {name: np.abs(ours[name] - theirs[name]).max() for name in ours}
    assert max(errors.values()) < tolerance, errors


def check_every_table_is_a_law(process):
    """Also for pairs that cannot happen, probabilities of 0 or 1e-30, and every pair of ends; gradients are finite."""
    N = process.num_tokens
    alphas = [0.0, 1e-6, 0.5, 1 - 2.0**-24, 1.0]
    pairs = [(at, a_s) for at in alphas for a_s in alphas if at <= a_s]
    spiked = np.eye(N)[1] * (1 - 1e-30) + 1e-30 * np.eye(N)[3]
    vectors = np.array([np.full(N, 1 / N), spiked, np.eye(N)[0]])
    rows = [(*pair, z, x, p) for pair in pairs for z in range(N + 1) for x in (0, 3) for p in vectors]
    columns = [np.array(column) for column in zip(*rows, strict=True)]

    def table_sum(alpha_t, alpha_s, p, z, x, seed_V):
        tables = [process.marginal(x, alpha_t), process.transition(z, alpha_s, alpha_t)]
        tables += [process.posterior(z, x, alpha_t, alpha_s)]
        tables += [process.reverse(z, p, alpha_t, alpha_s, reading) for reading in process.readings]
        return (jnp.stack(tables) * seed_V).sum(), jnp.stack(tables)

    function = jax.jit(jax.vmap(jax.value_and_grad(table_sum, (0, 1, 2), has_aux=True), (0, 0, 0, 0, 0, None)))
    alpha_t, alpha_s, z, x, p = columns
    (_, tables), gradients = function(alpha_t, alpha_s, p, z, x, np.arange(1.0, N + 2)[None])
    tables = np.asarray(tables)
    np.testing.assert_allclose(tables.sum(-1), 1, atol=2e-6)
    assert (tables >= 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    stays = alpha_t == alpha_s
    np.testing.assert_array_equal(tables[stays][:, 2:].argmax(-1), np.repeat(z[stays][:, None], tables.shape[1] - 2, 1))
    np.testing.assert_array_equal(tables[stays][:, 2:].max(-1), 1)


def check_samples(process, marginal_table, draws=50_000):
    """Draws follow the marginals; marginal_table: alpha -> [N, K]."""
    alpha_A = jnp.array([1.0, process.alpha_max, 0.7, 0.2, 0.0])
    x0 = jnp.broadcast_to(jnp.arange(5)[:, None] % process.num_tokens, (5, draws))
    zt = jax.jit(process.sample)(jax.random.key(11), x0, alpha_A[:, None])
    assert (zt.shape, zt.dtype) == (x0.shape, x0.dtype)
    for z_draws, x, alpha in zip(np.asarray(zt), range(5), alpha_A.tolist(), strict=True):
        assert_follows(z_draws, marginal_table(alpha)[x])


def check_prior(process, mean_marginal):
    """Draws of the prior follow the marginal of a uniform token; mean_marginal: alpha -> [K]."""
    prior = jax.jit(process.prior, static_argnums=1)
    for alpha in (0.0, 0.3):
        z = prior(jax.random.key(5), (200, 100), alpha)
        assert (z.shape, z.dtype) == ((200, 100), jnp.int32)
        assert_follows(np.asarray(z).ravel(), mean_marginal(alpha))


def check_step(process, step, zt, x0_probs_N, alpha_t, alpha_s, draws=40_000):
    """A reverse step of whole windows draws from the process's kernel at each of the positions zt, alpha_t, alpha_s."""
    kernel = jax.jit(jax.vmap(lambda z, a, b: process.reverse(z, x0_probs_N, a, b, process.reading)))
    law_WxV = np.asarray(kernel(zt, alpha_t, alpha_s), float)
    wide = lambda x_W: jnp.broadcast_to(x_W[None], (draws, len(x_W)))
    logits = jnp.broadcast_to(jnp.log(x0_probs_N)[None, None], (draws, len(zt), process.num_tokens))
    zs_BxW = np.asarray(jax.jit(step)(jax.random.key(2), wide(zt), logits, wide(alpha_t), wide(alpha_s)))
    for draws_B, law_V in zip(zs_BxW.T, law_WxV, strict=True):
        assert_follows(draws_B, law_V)


def assert_follows(draws, law, level=1e-4):
    """Chi-square of draws against a law over the first states; what has probability 0 must not occur at all."""
    counts = np.bincount(draws, minlength=len(law))
    assert counts[len(law) :].sum() == 0 and counts[: len(law)][law < 1e-9].sum() == 0
    seen = law >= 1e-9
    if seen.sum() > 1:
        expected = law[seen] / law[seen].sum() * counts.sum()
        assert chisquare(counts[: len(law)][seen], expected).pvalue > level


def check_bound(process, schedule, reading, steps=3, length=2):
    """The negative ELBO of random networks is above their exact -log p(x), which sums to 1, and not far above."""
    N, V = process.num_tokens, process.num_states
    chain = ReverseChain(hyperschedules.flat(length, steps), schedule, process, reading)
    raw = np.random.default_rng(4).dirichlet(np.ones(N), (steps, V**length, length))
    place_V = V ** np.arange(length - 1, -1, -1)
    with jax.enable_x64(True):
        network = jnp.asarray(raw)
        denoiser = lambda step, zt_BxL: network[step, (zt_BxL * place_V[None]).sum(-1)]
        texts = np.indices((N,) * length).reshape(length, -1).T
        total = jax.jit(jax.vmap(lambda x0_L: likelihood.nelbo(chain, denoiser, x0_L).total.sum()))(texts)
        model = model_likelihood(chain, raw)
    np.testing.assert_allclose(model.sum(), 1, atol=1e-9)
    gap = np.asarray(total) + np.log(model[tuple(texts.T)])
    assert (gap >= -1e-9).all() and 1e-3 < gap.max() < 20, gap


def model_likelihood(chain, raw):
    """p(x) [N, N] of the generative chain of two positions, by pushing the law of z through every step's kernels."""
    process, V = chain.process, chain.process.num_states
    alpha = np.stack([chain.alpha(step) for step in range(len(raw) + 1)])
    of_token = jax.vmap(process.marginal, (0, None))(jnp.arange(process.num_tokens), alpha[0, 0])
    law = np.outer(of_token.mean(0), of_token.mean(0))
    zt_ZxL = np.indices((V, V)).reshape(2, -1).T
    kernel = jax.vmap(jax.vmap(lambda z, p, a, b: process.reverse(z, p, a, b, chain.reading)), (0, 0, None, None))
    kernel = jax.jit(kernel)
    for step, probs in enumerate(raw):
        first, second = np.moveaxis(np.asarray(kernel(zt_ZxL, probs, alpha[step], alpha[step + 1])), 1, 0)
        law = np.einsum("z,za,zb->ab", law.ravel(), first, second)
    return law[:-1, :-1]
