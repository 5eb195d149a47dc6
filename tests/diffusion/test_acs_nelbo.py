"""The bound of the corrected chain against the kernels that the sampler draws from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import rel_entr

from hdlm_jax.diffusion import losses, noising, reverse
from hdlm_jax.diffusion.phases import Phase

N = 5


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.05, 0.25), (0.4, 0.55), (0.7, 1.0)])
def test_terms_are_the_kl_between_the_chains_kernels(eta, alpha_t, alpha_s):
    with jax.enable_x64():
        process, steps = noising.epsilon_hybrid(N, 0.1), 7
        zt, x0 = (jnp.asarray(a.ravel()) for a in np.meshgrid(np.arange(N + 1), np.arange(N), indexing="ij"))
        scores = jax.random.normal(jax.random.key(0), (len(zt), N + 1)).at[:, N].set(-jnp.inf)
        full = lambda value: jnp.full(len(zt), value)
        transfer = (alpha_s - alpha_t) / (1 - alpha_t)
        last = steps if alpha_s == 1 else 0.0
        phase = Phase(full(alpha_t), full(alpha_s), full(steps * transfer), full(last), zt, zt, full(steps))
        terms = losses.acs_nelbo(process, eta).terms(scores, x0, zt, phase)

        model = jax.vmap(lambda z, p: reverse.acs(process, eta, "cavity").kernel(z, p, alpha_t, alpha_s))
        true = jax.vmap(lambda z, p: reverse.acs(process, eta, "posterior").kernel(z, p, alpha_t, alpha_s))
        kl = rel_entr(true(zt, jax.nn.one_hot(x0, N)), model(zt, jax.nn.softmax(scores[:, :N], axis=-1))).sum(-1)
        np.testing.assert_allclose(sum(terms.values()), steps * kl, rtol=1e-9, atol=1e-12)


def test_without_correction_it_is_the_epsilon_bound():
    process = noising.epsilon_hybrid(N, 0.1)
    scores = jax.random.normal(jax.random.key(1), (6, N + 1)).at[:, N].set(-jnp.inf)
    zt, x0 = jnp.arange(6), jnp.array([0, 0, 2, 1, 3, 4])
    fill = lambda *values: jnp.array(values * 3)
    phase = Phase(fill(0.3, 0.8), fill(0.5, 1.0), fill(2.0, 7.0), fill(0.0, 7.0), zt, zt, fill(7.0, 7.0))
    ours, theirs = (
        loss.terms(scores, x0, zt, phase) for loss in (losses.acs_nelbo(process, 0.0), losses.epsilon_nelbo(process))
    )
    np.testing.assert_allclose(sum(ours.values()), sum(theirs.values()), rtol=1e-5, atol=1e-6)
