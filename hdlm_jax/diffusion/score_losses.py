"""Score entropy: what a network that learns concrete scores is trained on, and its exact discrete bound.

For one position with the scores s of the network and those of the truth r (diffusion/scores.py), per unit of
sigma = -log alpha (SEDD, Lou et al. 2024; Fathi et al. 2025 for the two clocks),

    entropy = sum_{y != z} Q(y -> z) (s_y - r_y log s_y + r_y (log r_y - 1)) >= 0, and 0 iff s = r.

y runs over the ordinary tokens, since nothing leaves the mask. Its integral over sigma is the diffusion term of
the negative ELBO. The network's outputs stand for log-scores as `scores.READINGS` says.

Every function returns terms as a `losses.Loss` wants them. Letters: R rows, V columns over N ordinary tokens, the
mask and perhaps padding (both -inf). alpha_t is above 0 everywhere: pure noise has no finite log-scores.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from hdlm_jax.diffusion import scores
from hdlm_jax.diffusion.bounds import divergence
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.diffusion.scores import Clocks, Targets

Terms = Callable[[Array, Array, Array, Phase], dict[str, Array]]


def entropy(of: Clocks, log_scores_RxV: Array, zt_R: Array, x0_R: Array, to: Targets) -> Array:
    """The score entropy of each row against its targets, nats per unit of sigma [R].

    >>> of, one = Clocks(2, 0.0), jnp.array([0])
    >>> to = Targets(jnp.ones(1), jnp.full(1, 0.5), jnp.zeros(1))
    >>> entropy(of, jnp.log(jnp.array([[0.5, 0.25, 1.0]])), one + 2, one, to).round(4).tolist()
    [0.25]
    """
    ids = jax.lax.broadcasted_iota(zt_R.dtype, log_scores_RxV.shape, log_scores_RxV.ndim - 1)
    channel, is_x0 = (ids < of.num_tokens) & (ids != zt_R[..., None]), ids == x0_R[..., None]
    by_token = lambda at_x0, other: jnp.where(is_x0, at_x0[..., None], other[..., None])
    log = lambda r: jnp.log(jnp.where(r > 0, r, 1))
    log_s = jnp.where(channel, log_scores_RxV, 0.0)
    r = by_token(to.at_x0, to.other)
    surprise = r * (log_s + 1 - by_token(log(to.at_x0), log(to.other)))
    return to.rate * jnp.where(channel, jnp.exp(log_s) - jnp.where(r > 0, surprise, 0.0), 0.0).sum(-1)


def score_entropy(
    process: NoisingProcess, continuous: bool = False, reading: str = "score", completes: bool = True
) -> Terms:
    """The exact score entropy: `diffusion`, and where it `completes` continuous times the `reconstruction` at 0+.

    At continuous times the weight is -d log(alpha)/du and the expectation is the negative ELBO but for the prior's
    divergence. A discrete step weighs log(alpha_s / alpha_t) times the steps that its draw stands for: its
    divergence to first order in its length, the last step's too, and no bound (`score_nelbo` is).

    Raises:
      UserError: a process without scores.
    """
    of = scores.clocks(process)

    def terms(logits_RxV, x0_R, zt_R, phase):
        out = {"diffusion": _diffusion(of, reading, scores.targets, continuous, logits_RxV, x0_R, zt_R, phase)}
        if continuous and completes:
            out["reconstruction"] = phase.last_weight * _last(of, reading, logits_RxV, x0_R, zt_R, phase)
        return out

    return terms


def published_score_entropy(process: NoisingProcess, continuous: bool = False) -> Terms:
    """The score entropy of the authors' published gamma-hybrid, which is not a bound; weighed as `score_entropy`,
    for the reading `published_score`.

    It measures against r_x0 = 1/(e^sigma - 1) and r_y = 0 at a mask and against the uniform scores of the whole
    sigma at a token, in place of those of the two clocks: exact for absorb and uniform, wrong between. Its value
    at the true scores is above 0 at some states, and its integral falls below the entropy of the text: perplexities
    from it read too low (by 6% for gamma 0.01, N = 200 and one position).

    Raises:
      UserError: a process without scores.
    """
    of = scores.clocks(process)

    def terms(logits_RxV, x0_R, zt_R, phase):
        columns = (logits_RxV, x0_R, zt_R, phase)
        return {"diffusion": _diffusion(of, "published_score", published_targets, continuous, *columns)}

    return terms


def score_nelbo(process: NoisingProcess, reading: str = "score") -> Terms:
    """The negative ELBO of the chain of discrete steps that the analytic sampler runs on the network's scores.

    `diffusion`: KL(q(z_s | zt, x0) || p) with p = `scores.tweedie`, and all that it does to make a law of
    any scores (its least entries are raised, it is normalised). `reconstruction`: -log p(x0) in a position's last
    step.

    Raises:
      UserError: a process without scores.
    """
    of = scores.clocks(process)

    def terms(logits_RxV, x0_R, zt_R, phase):
        last = phase.last_weight > 0
        nats_R = step_divergence(of, reading, logits_RxV, x0_R, zt_R, phase)
        return {
            "diffusion": jnp.where(last, 0.0, phase.steps) * nats_R,
            "reconstruction": jnp.where(last, phase.last_weight, 0.0) * nats_R,
        }

    return terms


def step_divergence(of: Clocks, reading: str, outputs_RxV: Array, x0_R: Array, zt_R: Array, phase: Phase) -> Array:
    """KL(q(z_s | zt, x0) || p(z_s | zt)) of the analytic step, nats [R]; -log p(x0 | zt) at alpha_s = 1."""
    N, d_R = of.num_tokens, scores.elapsed(phase.alpha_s, phase.alpha_t)
    log_s = scores.log_scores(of, outputs_RxV[..., : N + 1], zt_R, scores.noise_level(phase.alpha_t), reading)
    table_RxV = scores.tweedie(of, zt_R, jnp.exp(log_s), d_R, last=phase.alpha_s >= 1)
    return divergence(scores.true_step(of, zt_R, x0_R, scores.noise_level(phase.alpha_s), d_R), table_RxV)


def _last(of: Clocks, reading: str, outputs_RxV: Array, x0_R: Array, zt_R: Array, phase: Phase) -> Array:
    """-log p(x0 | zt) nats [R], as `step_divergence` at alpha_s = 1, without a table."""
    sigma_R = scores.noise_level(phase.alpha_t)
    log_s = scores.log_scores(of, outputs_RxV, zt_R, sigma_R, reading)
    weights_RxV = scores.step_weights(of, zt_R, jnp.exp(log_s), sigma_R, last=True)
    ids = jax.lax.broadcasted_iota(zt_R.dtype, weights_RxV.shape, weights_RxV.ndim - 1)
    return jnp.log(weights_RxV.sum(-1)) - jnp.log(jnp.where(ids == x0_R[..., None], weights_RxV, 0.0).sum(-1))


def sigma_weight(phase: Phase, continuous: bool) -> Array:
    """Weight of a term per unit of sigma, of the phase's shape: the time that its draw stands for."""
    return phase.steps * (1 / phase.alpha_t if continuous else scores.elapsed(phase.alpha_s, phase.alpha_t))


def published_targets(of: Clocks, zt: Array, x0: Array, sigma: Array) -> Targets:
    """What the published loss takes for `scores.targets`: those of the whole sigma in place of each clock."""
    alone = [scores.targets(Clocks(of.num_tokens, gamma), zt, x0, sigma) for gamma in (0.0, 1.0)]
    _, at_x0, other = (jnp.where(zt == of.num_tokens, *pair) for pair in zip(*alone, strict=True))
    return Targets(scores.targets(of, zt, x0, sigma).rate, at_x0, other)


def _diffusion(of: Clocks, reading: str, targets: Callable, continuous: bool, logits_RxV, x0_R, zt_R, phase) -> Array:
    sigma_R = scores.noise_level(phase.alpha_t)
    log_s = logits_RxV - scores.log_scale(of, zt_R, sigma_R, reading)[..., None]
    return sigma_weight(phase, continuous) * entropy(of, log_s, zt_R, x0_R, targets(of, zt_R, x0_R, sigma_R))
