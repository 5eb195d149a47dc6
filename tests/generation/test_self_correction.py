"""Self-correction against a plain loop: which token is replaced, when it stops, and what it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules, noise_schedules, phases
from hdlm_jax.diffusion.categorical import categorical, with_temperature
from hdlm_jax.errors import UserError
from hdlm_jax.generation import self_correction
from hdlm_jax.generation.network import all_rows, scores
from tests.generation.chains import L, N, chain_of, keys, random_params
from tests.models import tiny

B = 3
CHAIN = chain_of(
    hyperschedules.flat(L, 4), visibility="full", conditioning=8, schedule=noise_schedules.linear(), hidden=8, blocks=1
)
NOISE, PATIENCE = 0.05, 3


@pytest.fixture(scope="module")
def setting():
    """Parameters, finished texts with wrong tokens, and which of them are given."""
    rng = np.random.default_rng(0)
    x_BxL = jnp.asarray(rng.integers(0, N, (B, L)), jnp.int32)
    return random_params(CHAIN.config), x_BxL, jnp.asarray(rng.random((B, L)) < 0.3)


def corrected(setting, rows=slice(None), **options):
    params, x_BxL, given_BxL = setting
    options = {"temperature": 0.0, "noise": NOISE, "patience": PATIENCE, "limit": 40} | options
    out = self_correction.correct(CHAIN, params, x_BxL[rows], given_BxL[rows], keys(B)[rows], **options)
    return jax.tree.map(np.asarray, out)


def plain(setting, temperature):
    """Corrections of one text after the other, in numpy but for the network and the draws."""
    params, x_BxL, given_BxL = setting
    phase = phases.at_zero_plus((B, L), CHAIN.schedule, CHAIN.process.alpha_max)
    phase = phase._replace(alpha_t=jnp.full((B, L), 1 - NOISE))
    score = jax.jit(lambda x_BxL: scores(CHAIN, params, all_rows(CHAIN, params, x_BxL, phase))[..., :N])
    for i, (x_L, given_L) in enumerate(zip(np.array(x_BxL), np.array(given_BxL), strict=True)):
        best_L, best, first, stalled, calls = x_L, -1.0, None, 0, 0
        while stalled < PATIENCE and best < 1 and calls < 40:
            scores_LxN = np.asarray(score(np.broadcast_to(x_L, (B, L))))[0]
            accuracy = (scores_LxN.argmax(1) == x_L)[~given_L].mean()
            first = accuracy if first is None else first
            stalled = 0 if accuracy > best else stalled + 1
            if accuracy > best:
                best_L, best = x_L, accuracy
            warm_LxN = with_temperature(jnp.asarray(scores_LxN), temperature)
            drawn_L = np.asarray(categorical(jax.random.fold_in(keys(B)[i], calls), warm_LxN))
            p_L = np.asarray(jax.nn.softmax(warm_LxN, -1))[np.arange(L), drawn_L]
            differs_L = (drawn_L != x_L) & ~given_L
            calls += 1
            if differs_L.any():
                x_L, place = x_L.copy(), np.where(differs_L, p_L, -1).argmax()
                x_L[place] = drawn_L[place]
        yield best_L, first, best, calls


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_corrections_are_those_of_a_plain_loop(setting, temperature):
    out = corrected(setting, temperature=temperature)
    for i, (tokens_L, first, best, calls) in enumerate(plain(setting, temperature)):
        np.testing.assert_array_equal(out.tokens[i], tokens_L)
        np.testing.assert_allclose(out.accuracy[i], [first, best], rtol=1e-6)
        assert (out.calls[i], out.replaced[i]) == (calls, (tokens_L != np.asarray(setting[1])[i]).sum())
    assert out.replaced.sum() > 0
    assert (out.accuracy[:, 1] > out.accuracy[:, 0]).any()


def test_what_is_given_stays_and_self_accuracy_does_not_fall(setting):
    out = corrected(setting, temperature=0.5)
    given_BxL = np.asarray(setting[2])
    np.testing.assert_array_equal(out.tokens[given_BxL], np.asarray(setting[1])[given_BxL])
    assert (out.accuracy[:, 1] >= out.accuracy[:, 0]).all()
    assert out.tokens.max() < N


def test_a_text_is_corrected_alike_alone_and_in_a_batch(setting):
    batch, alone = corrected(setting, temperature=0.5), corrected(setting, rows=slice(1, 2), temperature=0.5)
    for together, single in zip(batch, alone, strict=True):
        np.testing.assert_array_equal(together[1:2], single)


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"temperature": -1}, "temperature: got -1"),
        ({"noise": 0}, r"noise: got 0; allowed: a number in \(0, 1\)"),
        ({"patience": 0}, "patience: got 0"),
        ({"limit": 1.5}, "limit: got 1.5"),
    ],
)
def test_dials_out_of_range_are_refused(setting, dials, message):
    with pytest.raises(UserError, match=message):
        corrected(setting, **dials)


FLAT = {"hyperschedule__kind": "flat"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"noising__kind": "absorb", "loss__kind": "absorb_nelbo"}, "noising.kind: got 'absorb'; allowed: 'gidd'"),
        (
            {"noising__kind": "epsilon_hybrid", "noising__epsilon": 0.1, "model__visibility": "prefix"},
            "model.visibility: got 'prefix'",
        ),
    ],
)
def test_models_that_cannot_judge_finished_tokens_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        self_correction.check(tiny.build(5, 8, **FLAT, **fields))


def test_models_that_have_seen_wrong_tokens_may_correct():
    self_correction.check(tiny.build(5, 8, **FLAT, noising__kind="epsilon_hybrid", noising__epsilon=0.1))
    fields = {"noising__kind": "gidd", "noising__uniform_share": 0.1, "loss__kind": "nelbo"}
    self_correction.check(tiny.build(5, 8, **FLAT, **fields))
