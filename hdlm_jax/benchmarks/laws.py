"""How far the law of samples is from the data's, for every sampler and number of calls, with a perfect network.

The data are texts of a hidden Markov model, short enough to list. The network is their exact posterior given the
noised text, by enumeration: what is left is the sampler's own error, from drawing several tokens in one call and from
what the sampler does beside its chain. Texts are drawn under a flat hyperschedule by the samplers' rules alone.

Letters: S samples, L positions, N tokens, V = N + 1, X = N^L texts, Z = V^L noised texts.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hdlm_jax.diffusion import noise_schedules, noising, orders, phases, remasking, samplers, scores
from hdlm_jax.diffusion.noising import NoisingProcess
from hdlm_jax.diffusion.rules import Move, Rule
from hdlm_jax.errors import require

N = 3
SCHEDULE = noise_schedules.linear(eps=1e-3)  # scores exist while something survives


class Case(NamedTuple):
    """A sampler of the comparison.

    Attributes:
      name: shown.
      kind: in `samplers.SAMPLERS`.
      process: the noising.
      reading: how the network is read.
      dials: of the sampler.
      limit: whether its law approaches the data's as calls grow.
      family: the panel of the picture that it is in; '' is every one.
    """

    name: str
    kind: str
    process: NoisingProcess
    reading: str = "posterior"
    dials: tuple[tuple[str, float], ...] = ()
    limit: bool = True
    family: str = "noise of several kinds"


ABSORB, EPSILON = noising.absorb(N), noising.epsilon_hybrid(N, 0.05)
GAMMA, UNIFORM, GIDD = noising.gamma_hybrid(N, 0.3), noising.uniform(N), noising.gidd(N, 0.2)
OTHERS = (
    Case("ancestral (epsilon_hybrid)", "ancestral", EPSILON),
    Case("acs", "acs", EPSILON, dials=(("eta", 0.25),)),
    Case("acs_published", "acs_published", EPSILON, dials=(("eta", 0.25),), limit=False),
    Case("analytic (gamma_hybrid)", "analytic", GAMMA, reading="score"),
    Case("euler (gamma_hybrid)", "euler", GAMMA, reading="score"),
    Case("ancestral (gidd)", "ancestral", GIDD),
    Case("ancestral (uniform)", "ancestral", UNIFORM),
)
ETA = (("eta", 0.1),)
REMASKING = tuple(
    Case(
        kind,
        kind,
        ABSORB,
        dials=() if kind == "remdm_conf" else ETA,
        limit=kind != "remdm_conf",
        family="tokens masked again",
    )
    for kind in remasking.RULES
)
EXACT_ORDERS = (
    "first_hitting",
    "entropy",
    "margin",
)  # which position is next does not depend on the token drawn for it
ORDERS = tuple(
    Case(kind, kind, ABSORB, limit=kind in EXACT_ORDERS, family="orders of unmasking") for kind in orders.RULES
)
CASES = (Case("ancestral (absorb)", "ancestral", ABSORB, family=""), *OTHERS, *REMASKING, *ORDERS)


def markov_law(length: int) -> np.ndarray:
    """float64 [N, ..., N], one axis a position: a hidden state that mostly moves on to the next, seen mostly as it is.

    >>> law = markov_law(2)
    >>> law.shape, float(law.sum()).__round__(9), float(law[0, 1] / law[0].sum()).__round__(2)
    ((3, 3), 1.0, 0.85)
    """
    states = np.arange(N)
    move = np.where(states[None, :] == (states[:, None] + 1) % N, 0.9, 0.05)
    seen = np.where(states[None, :] == states[:, None], 0.96, 0.02)
    table = (np.array([0.5, 0.3, 0.2])[:, None] * seen).T  # [text, state]
    for _ in range(length - 1):
        table = np.einsum("xs,sr,ra->xar", table, move, seen).reshape(-1, N)
    return table.sum(-1).reshape((N,) * length)


def perfect(case: Case, law: np.ndarray, alpha: float) -> np.ndarray:
    """float32 [Z, L, V]: what a perfect network puts out for every noised text at a survival, as the case reads it."""
    L, x_LxX = law.ndim, np.indices(law.shape).reshape(law.ndim, -1)
    z_LxZ = np.indices((N + 1,) * L).reshape(L, -1)
    q_NxV = np.asarray(jax.vmap(partial(case.process.marginal, alpha=alpha))(jnp.arange(N)), float)
    joint_ZxX = np.prod([q_NxV[x_X][:, z_Z].T for x_X, z_Z in zip(x_LxX, z_LxZ, strict=True)], axis=0) * law.ravel()
    if case.reading in scores.READINGS:
        return _perfect_scores(case, joint_ZxX.sum(1), z_LxZ, alpha)
    own_ZxLxN = np.stack([np.stack([joint_ZxX[:, x_X == a].sum(1) for a in range(N)], 1) for x_X in x_LxX], 1)
    logits_ZxLxN = np.log(np.maximum(own_ZxLxN, 1e-30))
    mask_ZxLx1 = np.full((*logits_ZxLxN.shape[:2], 1), -np.inf)
    return np.concatenate([logits_ZxLxN, mask_ZxLx1], -1).astype(np.float32)


def _perfect_scores(case: Case, p_Z: np.ndarray, z_LxZ: np.ndarray, alpha: float) -> np.ndarray:
    """Outputs whose log-scores are log p(z with another token in a place) - log p(z)."""
    L, V = len(z_LxZ), N + 1
    place_L, index_Z = V ** np.arange(L - 1, -1, -1), np.arange(V**L)
    other_ZxLxV = index_Z[:, None, None] + (np.arange(V) - z_LxZ.T[..., None]) * place_L[:, None]
    log_ZxLxV = np.log(p_Z[other_ZxLxV]) - np.log(p_Z)[:, None, None]
    sigma = jnp.full(z_LxZ.shape, scores.noise_level(jnp.float32(alpha)))
    scale_LxZ = scores.log_scale(scores.clocks(case.process), jnp.asarray(z_LxZ), sigma, case.reading)
    return (log_ZxLxV + np.asarray(scale_LxZ).T[..., None]).astype(np.float32)


def distances(case: Case, calls: Sequence[int], length: int, samples: int, seed: int = 0) -> list[dict]:
    """One row for each number of steps: total variation between the law of samples and the data's, and the calls made.

    Raises:
      UserError: fewer than one call or sample.
    """
    require(min(calls) >= 1, "calls", min(calls), "a positive integer")
    require(samples >= 1, "samples", samples, "a positive integer")
    law, rows = markov_law(length), []
    network = cache(partial(perfect, case, law))
    rule = samplers.build(case.kind, case.process, case.reading, **dict(case.dials))
    advance = jax.jit(partial(_advance, rule))
    for steps in calls:
        z_SxL, made = _sample(rule, case.process, network, advance, (samples, length), steps, seed)
        distance = total_variation(z_SxL, law)
        rows.append({"sampler": case.name, "family": case.family, "calls": made, "distance": distance})
    return rows


def measure(calls: Sequence[int] = (1, 2, 4, 8, 16, 32), length: int = 4, samples: int = 16_384) -> list[dict]:
    """`distances` of all `CASES`, and of samples of the data's law itself, the least that can be measured."""
    law = markov_law(length)
    drawn = np.random.default_rng(0).choice(law.size, samples, p=law.ravel())
    floor = total_variation(np.stack(np.unravel_index(drawn, law.shape), 1), law)
    rows = [{"sampler": "the data's law", "family": "", "calls": n, "distance": floor} for n in calls]
    return rows + [row for case in CASES for row in distances(case, _sensible(case, calls, length), length, samples)]


def _sensible(case: Case, calls: Sequence[int], length: int) -> Sequence[int]:
    """The calls under which a sampler is what its name says (`samplers.check`)."""
    if case.kind == "first_hitting":
        return (length,)
    return [n for n in calls if n > 1 or not case.kind.startswith(("remdm", "mask_predict"))]


def total_variation(x_SxL: np.ndarray, law: np.ndarray) -> float:
    """Half the summed difference between the frequencies of texts and their law; whatever is no text counts as missing.

    >>> total_variation(np.array([[0], [0], [1], [1]]), np.array([0.5, 0.25, 0.25]))
    0.25
    """
    text_S = x_SxL[(x_SxL < law.shape[0]).all(1)]
    counts = np.bincount(np.ravel_multi_index(tuple(text_S.T), law.shape), minlength=law.size)
    share = counts / len(x_SxL)
    return float((np.abs(share - law.ravel()).sum() + 1 - share.sum()) / 2)


def _sample(
    rule: Rule,
    process: NoisingProcess,
    network: Callable[[float], np.ndarray],
    advance: Callable,
    shape: tuple[int, int],
    steps: int,
    seed: int,
) -> tuple[np.ndarray, float]:
    """Finished texts [S, L] of a flat run of `steps`, and the mean number of calls that a text needed."""
    schedule = SCHEDULE if rule.warp is None else rule.warp(SCHEDULE)
    alphas = np.asarray(phases.survival(jnp.arange(steps, -1, -1), steps, schedule, process.alpha_max))
    prior_rng, rng = jax.random.split(jax.random.key(seed))
    z_SxL = process.prior(prior_rng, shape, alphas[0])
    memory = None if rule.memory is None else jnp.full(shape, rule.memory)
    made, saves = 0.0, rule.chance is not None and rule.draw is None  # without masks nothing is left to ask
    for k in range(steps):
        made += (np.asarray(z_SxL) == process.mask).any(1).mean() if saves else 1
        # tokens of a process that freezes them tell the same at every noise level: one table serves all
        table_ZxLxV = network(0.5 if process.frozen else float(alphas[k]))
        z_SxL, memory = advance(jax.random.fold_in(rng, k), z_SxL, table_ZxLxV, alphas[k : k + 2], memory)
    return np.asarray(z_SxL), float(made)


def _advance(rule: Rule, rng, z_SxL, table_ZxLxV, alphas, memory):
    S, L = z_SxL.shape
    place_L = jnp.asarray((N + 1) ** np.arange(L - 1, -1, -1))
    outputs_SxLxV = table_ZxLxV[(z_SxL * place_L[None, :]).sum(1)]
    move = Move(jnp.full(L, alphas[0]), jnp.full(L, alphas[1]), jnp.ones(L, bool))
    axes = (0, 0, 0, None, None if memory is None else 0)
    return jax.vmap(rule.step, axes)(jax.random.split(rng, S), z_SxL, outputs_SxLxV, move, memory)
