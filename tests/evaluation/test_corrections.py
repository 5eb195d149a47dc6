"""What samplers do to wrong tokens, against the exact posterior of independent tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import reverse, samplers
from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import corrections, perplexity
from hdlm_jax.models import passes
from tests.evaluation.known import BLOCK, EPS, EPSILON, LAW, L, N, knowing, texts
from tests.models import tiny


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    """Compiling takes most of the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def expected_repair():
    """Probabilities that a token is restored and damaged by an exact last call after a uniform share EPSILON."""
    noise_NxN = (1 - EPSILON) * np.eye(N) + EPSILON / N  # q(z | x)
    joint_NxN = LAW[:, None] * noise_NxN
    posterior_NxN = joint_NxN / joint_NxN.sum(0)  # [x, z]
    restored = sum(joint_NxN[x, z] * posterior_NxN[x, z] for x in range(N) for z in range(N) if x != z)
    damaged = sum(joint_NxN[x, x] * (1 - posterior_NxN[x, x]) for x in range(N))
    return restored, damaged


@pytest.mark.parametrize("fields", [EPS, EPS | BLOCK], ids=["flat", "block"])
def test_the_last_call_repairs_as_the_posterior_says(fields):
    made, x0_WxL = tiny.build(N, L, **fields), texts(1500)
    rule = samplers.build("acs", made.process, "cavity", eta=1.0)
    report = corrections.repair(made, knowing(made), x0_WxL, rule, share=EPSILON, calls=1, batch=1500)
    (row,), count = report.rows, x0_WxL.size
    assert (row["call"], row["level after"], row["tokens"]) == (1, 0, count)
    chances = {"wrong": EPSILON * (1 - 1 / N)} | dict(zip(corrections.CHANGES[2:4], expected_repair(), strict=True))
    for name, p in chances.items():
        assert abs(row[name] - p * count) < 4 * np.sqrt(count * p * (1 - p)), name
    assert report.summary["wrong -> right"] == row["wrong -> right"]


def test_every_call_of_a_repair_follows_its_table():
    """Wrong tokens after each call, against the product of the exact kernels: h = 1 - 1/level at eta 1."""
    made, x0_WxL = tiny.build(N, L, **EPS), texts(2000)
    rule = samplers.build("acs", made.process, "cavity", eta=1.0)
    report = corrections.repair(made, knowing(made), x0_WxL, rule, share=EPSILON, calls=4, batch=2000)
    assert [row["level after"] for row in report.rows] == [3, 2, 1, 0]
    noise_NxN = (1 - EPSILON) * np.eye(N) + EPSILON / N
    posterior_NxN = (LAW[:, None] * noise_NxN / (LAW @ noise_NxN)).T  # [z, x]
    state_NxN = noise_NxN  # [x0, z]
    for row in report.rows:
        h = 1 - 1 / (row["level after"] + 1)
        again_NxN = (1 - h) * np.eye(N) + h * posterior_NxN @ noise_NxN
        state_NxN = state_NxN @ (again_NxN if row["level after"] else posterior_NxN)
        p = 1 - LAW @ np.diag(state_NxN)
        wrong = row["wrong"] - row["wrong -> right"] + row["right -> wrong"]
        assert abs(wrong - p * x0_WxL.size) < 4 * np.sqrt(x0_WxL.size * p * (1 - p)), row


def test_nothing_is_corrected_at_eta_0_but_in_the_last_call():
    made = tiny.build(N, L, **EPS)
    rule = samplers.build("acs", made.process, "cavity", eta=0.0)
    earlier, last = corrections.repair(made, knowing(made), texts(200), rule, share=0.5, calls=2, batch=200).rows
    assert earlier["wrong -> right"] == earlier["right -> wrong"] == earlier["wrong -> other wrong"] == 0
    assert last["wrong -> right"] > 0 and last["right -> wrong"] > 0
    first, final = corrections.one_call(made, knowing(made), texts(300), rule, draws=2, batch=300).rows
    assert (first["call"], final["call"]) == ("earlier", "last")
    assert first["wrong"] > 0 and first["wrong -> right"] == first["right -> wrong"] == 0
    assert final["wrong -> right"] > 0


def test_a_temperature_sharpens_the_draws():
    """At 0 this network is sure of token 0 everywhere."""
    made, x0_WxL = tiny.build(N, L, **EPS), texts(50)
    rule = samplers.build("acs", made.process, "cavity", eta=1.0)
    (row,) = corrections.repair(made, knowing(made), x0_WxL, rule, temperature=0.0, share=EPSILON, batch=50).rows
    wrong = row["wrong"] - row["wrong -> right"] + row["right -> wrong"]
    assert wrong == (x0_WxL != 0).sum()


def test_one_call_corrects_as_its_table_says():
    """Restored and damaged tokens of the earlier calls of ACS, against the exact kernel at the same noise."""
    made, x0_WxL = tiny.build(N, L, **EPS), texts(1000)
    rule = samplers.build("acs", made.process, "cavity", eta=1.0)
    earlier, _ = corrections.one_call(made, knowing(made), x0_WxL, rule, draws=1, batch=1000).rows
    noise = jax.jit(lambda rng: passes.noise(perplexity.in_steps(made), rng, jnp.asarray(x0_WxL), training=False))
    noised = noise(jax.random.key(5))
    here = np.asarray((noised.zt < N) & (noised.phase.alpha_s < 1))
    kernel = reverse.acs(made.process, eta=1.0, reading="cavity").kernel
    table = jax.vmap(lambda z, t, s: kernel(z, jnp.asarray(LAW, jnp.float32), t, s))
    law_KxV = np.asarray(table(noised.zt[here], noised.phase.alpha_t[here], noised.phase.alpha_s[here]))
    x0_K, zt_K = x0_WxL[here], np.asarray(noised.zt)[here]
    right_K = law_KxV[np.arange(len(x0_K)), x0_K]
    shares = {"wrong -> right": right_K[x0_K != zt_K].sum(), "right -> wrong": (1 - right_K[x0_K == zt_K]).sum()}
    for name, expected in shares.items():  # two draws of the noise
        assert abs(earlier[name] - expected * earlier["tokens"] / len(x0_K)) < 5 * np.sqrt(2 * expected), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 0.0}, r"--share: got 0.0; allowed: a number in \(0, 1\)"),
        ({"calls": 9}, r"--calls: got 9; allowed: a whole number from 1 to 8 \(the levels of the hyperschedule\)"),
    ],
)
def test_repairs_out_of_range_are_refused(given, message):
    made = tiny.build(N, L, **EPS)
    with pytest.raises(UserError, match=message):
        corrections.repair(made, {}, texts(4), samplers.build("acs", made.process, eta=0.5), **given)


def test_a_window_of_many_levels_is_refused():
    made = tiny.build(N, L, **EPS | BLOCK | {"hyperschedule__kind": "slide"})
    with pytest.raises(UserError, match="hyperschedule.kind: got 'slide'; allowed: 'flat' or 'block'"):
        corrections.repair(made, {}, texts(4), samplers.build("acs", made.process, eta=0.5))


def test_tokens_that_are_masked_again_come_back_better():
    """ReMDM with a flat run: masks in between, none at the end, and the law of the noise at 0+ before the last call."""
    made = tiny.build(N, L, **EPS)
    rule = samplers.build("remdm_rescale", made.process, "cavity", eta=1.0)
    *earlier, last = corrections.repair(made, knowing(made), texts(400), rule, share=EPSILON, calls=3, batch=400).rows
    assert earlier[0]["right -> wrong"] > last["right -> wrong"]  # masks
    restored, damaged = expected_repair()
    assert last["wrong -> right"] > restored * last["tokens"]  # more were drawn again than by one exact call


def test_a_sampler_that_weighs_positions_needs_one_window():
    made = tiny.build(N, L, **EPS | BLOCK)
    rule = samplers.build("remdm_conf", made.process, "cavity")
    with pytest.raises(UserError, match="--sampler: got 'remdm_conf'; allowed: 'ancestral', .* hyperschedule 'flat'"):
        corrections.one_call(made, {}, texts(4), rule)


def test_z_counts_windows_not_positions():
    counts = dict.fromkeys(corrections.CHANGES, np.zeros((1, 3), int)) | {"wrong -> right": np.array([[4, 0, 2]])}
    assert corrections._changes(counts)["z"] == pytest.approx(2 / (2 / np.sqrt(3)))
