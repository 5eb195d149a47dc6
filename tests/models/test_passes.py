"""Passes: unbiased for the enumerated bound, a chain rule where they are a GPT, and one gradient for every chunking."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from hdlm_jax.diffusion import likelihood, losses, phases
from hdlm_jax.diffusion.likelihood import ReverseChain
from hdlm_jax.models import layouts, passes, transformer
from hdlm_jax.models.passes import Noised
from tests.models import tiny

EPSILON = {"noising__kind": "epsilon_hybrid", "noising__epsilon": 0.3}
ABSORB = {"noising__kind": "absorb", "loss__kind": "absorb_nelbo"}
UNIFORM = {"noising__kind": "uniform", "loss__kind": "nelbo"}
GAMMA = {"noising__kind": "gamma_hybrid", "noising__gamma": 0.4, "loss__kind": "nelbo"}
GIDD = {"noising__kind": "gidd", "noising__uniform_share": 0.3, "loss__kind": "nelbo"}
NEAREST = {"noising__kind": "d3pm_nearest", "loss__kind": "nelbo"}
BLOCK = {"hyperschedule__kind": "block", "hyperschedule__width": 2, "hyperschedule__rate": "1"}
SLIDE = {"hyperschedule__kind": "slide", "hyperschedule__width": 2, "hyperschedule__rate": "1"}
SLOW_SLIDE = {"hyperschedule__kind": "slide", "hyperschedule__width": 1, "hyperschedule__rate": "1/2"}
FLAT = {"hyperschedule__kind": "flat", "hyperschedule__steps": 2}
GEOMETRIC = {"noise_schedule__kind": "geometric", "noise_schedule__smin": 0.2, "noise_schedule__smax": 1.5}
PREFIX = {"model__visibility": "prefix"}
SHIFTED = PREFIX | {"model__prediction": "shifted"}
ENUMERATED = {
    "aligned slide": (EPSILON | SLIDE | PREFIX, "cavity", False),
    "aligned block, absorb": (ABSORB | BLOCK | PREFIX, "posterior", False),
    "shifted block": (EPSILON | BLOCK | SHIFTED, "hybrid", True),
    "shifted slide": (EPSILON | SLIDE | SHIFTED, "cavity", False),
    "shifted slow slide, geometric": (EPSILON | SLOW_SLIDE | SHIFTED | GEOMETRIC, "posterior", True),
    "aligned flat in the plain layout": (EPSILON | FLAT | PREFIX, "cavity", False),
    "shifted block, gamma": (GAMMA | BLOCK | SHIFTED, "cavity", True),
    "aligned slide, uniform": (UNIFORM | SLIDE | PREFIX, "posterior", False),
    "shifted slow slide, gidd": (GIDD | SLOW_SLIDE | SHIFTED, "cavity", True),
    "flat in discrete steps, nearest": (NEAREST | FLAT, "cavity", False),
}
SLOW = (
    "shifted slow slide, gidd",
    "aligned block, absorb",
    "aligned slide",
    "shifted slow slide, geometric",
    "aligned flat in the plain layout",
)


def every_phase(made, length):
    """The phases that a pass draws from, each once: fields [draws, L], and how many draws there are."""
    if made.layout == "plain":
        draws = made.hs.num_steps
        zero = jnp.zeros(draws, jnp.int32)
        alpha_max = made.process.alpha_max
        return phases.at_step(jnp.arange(draws), zero, length, made.hs, made.schedule, alpha_max), draws
    draws = made.hs.period
    fraction = (jnp.arange(draws) + 0.5) / draws
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "stratified", lambda rng, count: jnp.tile(fraction, count // draws))
        origin = jnp.zeros(draws, jnp.int32)
        return phases.tiled(jax.random.key(0), origin, made.hs, made.schedule, made.process.alpha_max), draws


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []) for case in ENUMERATED]
)
def test_the_mean_of_a_pass_is_the_enumerated_bound(case):
    """Over every phase and every noised text with its probability, position by position, in float64."""
    fields, reading, trailing = ENUMERATED[case]
    N, L, x0_L = 2, 3, jnp.array([1, 0, 1])
    made = tiny.build(N, L, **fields)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, tiny.random_params(made.model, dtype=np.float64))
        phase, draws = every_phase(made, L)
        zt_ZxL = jnp.asarray(list(itertools.product(range(N + 1), repeat=L)), jnp.int32)
        Z = len(zt_ZxL)

        @jax.jit
        def mean_of_passes(params):
            q_DxLxV = jax.vmap(lambda alpha_L: jax.vmap(made.process.marginal)(x0_L, alpha_L))(phase.alpha_t)
            place = jnp.broadcast_to(zt_ZxL[None, ..., None], (draws, Z, L, 1))
            q_DxZ = jnp.take_along_axis(q_DxLxV[:, None], place, -1)[..., 0].prod(-1)
            spread = jax.tree.map(lambda x: jnp.repeat(x, Z, axis=0), phase)
            noised = Noised(jnp.tile(zt_ZxL, (draws, 1)), spread)
            x0 = jnp.broadcast_to(x0_L[None], (draws * Z, L))
            per_position = losses.bound(made.process, reading).terms
            terms = sum(passes.terms(made, params, x0, noised, per_position).values())
            # what cannot happen has no finite cost
            terms = jnp.where(q_DxZ[..., None] > 0, terms.reshape(draws, Z, L), 0)
            return (terms * q_DxZ[..., None]).sum((0, 1)) / draws

        @jax.jit
        def enumerated(params):
            chain = ReverseChain(made.hs, made.schedule, made.process, reading)
            return likelihood.nelbo(chain, tiny.plain_denoiser(made, params, trailing), x0_L)

        exact = enumerated(params)
        np.testing.assert_allclose(mean_of_passes(params), exact.diffusion + exact.last, rtol=1e-10)
        most = float(made.schedule.alpha(jnp.ones(())))
        np.testing.assert_allclose(losses.prior_kl(made.process, most, x0_L), exact.prior, atol=1e-10)


def test_a_shifted_quenched_absorb_pass_is_the_chain_rule_exactly():
    """Every pass, whatever it draws: no second copy, and -log p of each token after the ones before it."""
    made = tiny.build(5, 4, **ABSORB, **SHIFTED, hyperschedule__kind="quenched")
    x0_BxL = jnp.asarray(np.random.default_rng(0).integers(0, 5, (3, 4)), jnp.int32)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, tiny.random_params(made.model, dtype=np.float64))

        @jax.jit
        def one_pass(params, rng):
            noised = passes.noise(made, rng, x0_BxL)
            assert passes.rows(made, x0_BxL, noised).tokens.shape == (3, 4)
            return passes.terms(made, params, x0_BxL, noised, made.loss.terms)["reconstruction"]

        @jax.jit
        def chain_rule(params):
            """-log p(token | the tokens before it), one call per position on just what precedes it."""
            nats = []
            for i in range(4):
                tokens = jnp.concatenate([jnp.full((3, 1), tiny.BOS), x0_BxL[:, :i]], 1)
                positions = jnp.broadcast_to(jnp.arange(-1, i)[None], tokens.shape)
                attention = layouts.dense(jnp.tril(jnp.ones((1, i + 1, i + 1), bool)))
                hidden, _ = transformer.forward(made.model, params, tokens, positions, attention)
                log_p = jax.nn.log_softmax(transformer.logits(made.model, params, hidden)[:, -1])
                nats.append(-jnp.take_along_axis(log_p, x0_BxL[:, i, None], 1)[:, 0])
            return jnp.stack(nats, 1)

        theirs = chain_rule(params)
        for seed in range(3):
            np.testing.assert_allclose(one_pass(params, jax.random.key(seed)), theirs, rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        (EPSILON | BLOCK | PREFIX, 2 * 6),
        (EPSILON | SLIDE | SHIFTED, 2 * 6),
        (EPSILON | BLOCK | SHIFTED, 2 * 6 + 4),
        (EPSILON | SLIDE | SHIFTED | GEOMETRIC, 2 * 6 + 6),
        (EPSILON | SHIFTED | {"hyperschedule__kind": "quenched"}, 6),
        (EPSILON | FLAT | PREFIX, 6),
        (EPSILON | FLAT | SHIFTED, 7),
        (EPSILON | FLAT | SHIFTED | {"hyperschedule__steps": 1}, 6),
        (EPSILON | FLAT | {"model__prediction": "shifted"}, 7),
        (EPSILON | FLAT, 6),
    ],
)
def test_what_a_pass_feeds(fields, rows):
    """Two copies where tiled, one where plain or causal, and trailing rows where a window ends in information."""
    made = tiny.build(5, 6, **fields)
    x0_BxL = jnp.zeros((2, 6), jnp.int32)
    tokens = lambda rng: passes.rows(made, x0_BxL, passes.noise(made, rng, x0_BxL)).tokens
    assert jax.eval_shape(tokens, jax.random.key(0)).shape == (2, rows)


def by_ordinary_differentiation(made, x0_BxL, noised, context_weight):
    """(params) -> (loss, terms), all scores at once; the clean copy's tokens by a causal pass of their own."""

    def loss(params):
        terms = passes.terms(made, params, x0_BxL, noised, made.loss.terms)
        fed = layouts.causal(made.model, x0_BxL)
        hidden, _ = transformer.forward(made.model, params, fed.tokens, fed.positions, fed.attention)
        terms["context"] = losses.cross_entropy(transformer.logits(made.model, params, hidden), x0_BxL)
        means = {name: x.mean() for name, x in terms.items()}
        return sum(means.values()) - (1 - context_weight) * means["context"], means

    return loss


@pytest.mark.parametrize(
    ("rows_per_chunk", "context_weight"), [(5, 0.7), pytest.param(1 << 20, 0.0, marks=pytest.mark.slow)]
)
def test_the_loss_and_its_gradient_by_chunks_are_those_of_the_terms(rows_per_chunk, context_weight):
    """12 positions in chunks of 5, of which the last is filled up, and in one."""
    changed = {"loss__rows_per_chunk": rows_per_chunk, "loss__context_weight": context_weight}
    made = tiny.build(5, 6, **EPSILON, **SLIDE, **SHIFTED, **changed)
    params = tiny.random_params(made.model)
    x0_BxL = jnp.asarray(np.random.default_rng(0).integers(0, 5, (2, 6)), jnp.int32)
    noised = jax.jit(partial(passes.noise, made))(jax.random.key(1), x0_BxL)

    def chunked(params):
        loss, terms = passes.mean_loss(made, params, x0_BxL, noised, None)
        return 3 * loss, terms  # the incoming cotangent counts too

    (value, terms), gradient = jax.jit(jax.value_and_grad(chunked, has_aux=True))(params)
    plain = by_ordinary_differentiation(made._replace(rows_per_chunk=1 << 20), x0_BxL, noised, context_weight)
    (their_value, their_terms), their_gradient = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    np.testing.assert_allclose(value, 3 * their_value, rtol=1e-5)
    assert set(terms) == {"mask", "shuffled", "clean"} | ({"context"} if context_weight else set())
    for name, term in terms.items():
        np.testing.assert_allclose(term, their_terms[name], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(their_gradient), strict=True):
        np.testing.assert_allclose(ours, 3 * theirs, atol=2e-5 * max(1, np.abs(theirs).max()))


def arrays(jaxpr):
    """Every array of a program, those of the programs inside it too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            yield from arrays(inner) if hasattr(inner, "eqns") else ()


@pytest.mark.parametrize("kind", ["score_entropy", "published_score_entropy", "nelbo", "hybrid_cross_entropy"])
def test_no_array_of_a_training_step_holds_the_scores_of_all_rows(kind):
    """Neither B L V numbers nor V V: scores of one chunk are the largest."""
    B, L, chunk, N = 4, 16, 8, 3000
    process = EPSILON if kind == "hybrid_cross_entropy" else GAMMA
    changed = {"loss__kind": kind, "loss__rows_per_chunk": chunk, "model__conditioning": 8, "noise_schedule__eps": 5e-3}
    made = tiny.build(N, L, **(process | changed))
    params = tiny.random_params(made.model)

    def loss(params, rng, x0_BxL):
        return passes.mean_loss(made, params, x0_BxL, passes.noise(made, rng, x0_BxL), None)[0]

    step = jax.make_jaxpr(jax.value_and_grad(loss))(params, jax.random.key(0), jnp.zeros((B, L), jnp.int32))
    sizes = [np.prod(array.shape) for array in arrays(step.jaxpr) if jnp.issubdtype(array.dtype, jnp.floating)]
    assert chunk * N < max(sizes) < 2 * chunk * N < B * L * N, max(sizes)


def test_training_may_start_texts_anywhere_and_evaluation_starts_at_0():
    """Origins are 0 with the chance asked for, else uniform; levels follow the range in training only.

    At every level the tokens follow the process.
    """
    share, B, L = 0.6, 4000, 9
    origin_B = np.asarray(jax.jit(partial(passes._origins, B=B, L=L, share=share))(jax.random.key(0)))
    moved = (origin_B > 0).sum()
    assert abs(moved - share * B) < 4 * (share * (1 - share) * B) ** 0.5
    assert chisquare(np.bincount(origin_B, minlength=L)[1:]).pvalue > 1e-3 and origin_B.max() == L - 1

    block = {"hyperschedule__kind": "block", "hyperschedule__width": 4, "hyperschedule__rate": "1/2"}
    made = tiny.build(5, L, **EPSILON, **block, **PREFIX, loss__noise_range=(0.5, 1.0), loss__origin_share=1.0)
    x0_BxL = jnp.full((B, L), 2, jnp.int32)
    both = jax.jit(lambda rng: [passes.noise(made, rng, x0_BxL, training) for training in (True, False)])
    training, evaluation = jax.tree.map(np.asarray, both(jax.random.key(1)))
    level = lambda noised: (8 * (1 - noised.phase.alpha_t)).round().astype(int)
    np.testing.assert_array_equal(np.unique(level(training)), [5, 6, 7, 8])
    np.testing.assert_array_equal(np.unique(level(evaluation)), np.arange(1, 9))
    windows = np.arange(L) // 4 * 4
    assert (evaluation.phase.start == windows[None]).all()
    assert (training.phase.start != windows[None]).any(1).mean() > 0.5

    at_half = np.bincount(evaluation.zt[level(evaluation) == 4], minlength=6)
    law = 0.5 * np.array([0.06, 0.06, 0.76, 0.06, 0.06, 1.0])
    assert chisquare(at_half, law * at_half.sum()).pvalue > 1e-3
    assert (evaluation.zt[level(evaluation) == 8] == 5).all()


def test_texts_at_0_plus_are_shuffled_and_never_masked():
    made = tiny.build(5, 4, **EPSILON, **FLAT, loss__kind="epsilon_nelbo")
    x0_BxL = jnp.full((4000, 4), 2, jnp.int32)
    noised = jax.jit(partial(passes.at_zero_plus, made))(jax.random.key(0), x0_BxL)
    counts = np.bincount(np.asarray(noised.zt).ravel(), minlength=6)
    assert (
        counts[5] == 0 and chisquare(counts[:5], counts.sum() * np.array([0.06, 0.06, 0.76, 0.06, 0.06])).pvalue > 1e-3
    )
    assert (noised.phase.last_weight == 1).all() and not noised.phase.mask_weight.any()
    shown = jax.jit(partial(passes.noise, made))(jax.random.key(0), x0_BxL).phase.last_weight[:, 0] > 0
    assert abs(float(shown.mean()) - 0.1) < 1 / 4000  # stratified


def test_texts_start_where_a_group_of_settled_rows_does():
    slide = {"hyperschedule__kind": "slide", "hyperschedule__width": 4, "hyperschedule__rate": "2"}
    made = tiny.build(5, 9, **EPSILON, **slide, **PREFIX, model__context_group=2, loss__origin_share=1.0)
    start_BxL = passes.noise(made, jax.random.key(0), jnp.zeros((64, 9), jnp.int32)).phase.start
    assert (start_BxL % 2 == 0).all() and (start_BxL > 0).any()
