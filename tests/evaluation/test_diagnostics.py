"""Diagnostics of networks whose answers are known: the exact posterior of independent tokens, and a bag of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import reverse
from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import diagnostics, perplexity
from hdlm_jax.models import passes
from tests.models import tiny

LAW = np.array([0.6, 0.25, 0.1, 0.05])  # of independent tokens
N, L, EPSILON = len(LAW), 6, 0.2
EPS = {"noising__epsilon": EPSILON, "loss__kind": "epsilon_nelbo", "sampler__steps": 8}
BLOCK = {"model__visibility": "prefix", "hyperschedule__kind": "block", "hyperschedule__width": 3}
BLOCK |= {"hyperschedule__rate": "1", "loss__origin_share": 0.0}
AR = {"model__visibility": "prefix", "model__prediction": "shifted", "hyperschedule__kind": "quenched"}
AR |= {"noising__kind": "absorb", "loss__kind": "absorb_nelbo", "sampler__kind": "ancestral", "noising__epsilon": None}


def texts(count, seed=0):
    return np.random.default_rng(seed).choice(N, (count, L), p=LAW).astype(np.int32)


def knowing(made, sharpness=1.0):
    """The network that predicts `LAW` whatever it sees: exact for independent tokens under the reading 'cavity'."""
    params = jax.tree.map(np.zeros_like, tiny.random_params(made.model))
    bias = np.append(sharpness * np.log(LAW), np.zeros(made.model.padded_vocabulary - N))
    return params | {"head_bias": bias.astype(np.float32)}


def bag(made):
    """A network whose scores are a multiple of how often each token is seen, in any order."""
    params = jax.tree.map(np.zeros_like, tiny.random_params(made.model))
    D = made.model.hidden
    params["embedding"][:N, :N] = np.eye(N)
    params["norm"]["scale"] += 1.0
    blocks = params["blocks"]
    blocks["norm_attention"]["scale"] += 1.0
    blocks["qkv"]["kernel"][:, :, 2 * D :] = np.eye(D)  # queries and keys 0: attention is the mean of the values
    blocks["out"]["kernel"][:] = 10 * np.eye(D)
    params["head_kernel"][:N, :N] = 2 * np.eye(N)
    return params


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    """Compiling takes most of the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---- context


def test_a_bag_of_tokens_misses_what_is_hidden_and_not_the_order():
    made = tiny.build(N, L, **EPS)
    same_WxL = np.repeat(np.arange(64)[:, None] % N, L, 1).astype(np.int32)  # a text is one token, all along
    report = diagnostics.context(made, bag(made), same_WxL, draws=8, batch=48)
    hidden, order, left = report.rows
    assert [row["ablation"] for row in report.rows] == ["right hidden", "right shuffled", "left hidden"]
    assert hidden["z"] > 8 and hidden["difference"] > 0.1 and left["z"] > 4
    assert abs(order["difference"]) < 1e-5
    assert hidden["difference"] == pytest.approx(hidden["nats"] - hidden["intact nats"])
    assert 100 < report.summary["predictions"] <= 8 * 64
    assert report.settings["draws"] == 8 and report.settings["windows"] == 64


@pytest.mark.parametrize("fields", [EPS, EPS | BLOCK], ids=["full", "block"])
def test_a_network_that_looks_at_nothing_loses_nothing(fields):
    made = tiny.build(N, L, **fields)
    for row in diagnostics.context(made, knowing(made), texts(16), draws=2).rows:
        assert (row["difference"], row["z"]) == (0.0, 0.0)
        assert row["nats"] > 0


def test_the_ablations_change_one_side_of_the_window_alone():
    made, x0_BxL = tiny.build(N, L, **EPS | BLOCK), jnp.asarray(texts(200))
    shown, phase, place_B, counted_B = diagnostics.ablations(made, x0_BxL, jax.random.key(0))
    intact, hidden, mixed, left = (np.asarray(shown[name]) for name in ("intact", *diagnostics.ABLATIONS))
    mask, moved = made.process.mask, 0
    for b in np.flatnonzero(counted_B):
        i = int(place_B[b])
        start, stop = i // 3 * 3, i // 3 * 3 + 3  # its block
        assert intact[b, i] == mask and (intact[b, i + 1 : stop] != mask).any()
        assert (int(phase.start[b, i]), int(phase.stop[b, i])) == (start, stop)
        expected = intact[b].copy()
        expected[i + 1 : stop] = mask
        np.testing.assert_array_equal(hidden[b], expected)
        expected = intact[b].copy()
        expected[start:i] = mask
        np.testing.assert_array_equal(left[b], expected)
        assert sorted(mixed[b, i + 1 : stop]) == sorted(intact[b, i + 1 : stop])
        np.testing.assert_array_equal(np.delete(mixed[b], range(i + 1, stop)), np.delete(intact[b], range(i + 1, stop)))
        moved += (mixed[b] != intact[b]).any()
    assert moved > 0
    assert len({int(i) for i in place_B[counted_B]}) == 4  # every position of a block but its last


def test_shuffles_are_uniform_and_stay_inside():
    z_L, moves_L = jnp.arange(5), jnp.array([False, True, False, True, True])
    rngs = jax.random.split(jax.random.key(1), 6000)
    found = np.asarray(jax.vmap(lambda rng: diagnostics.shuffled(rng, z_L, moves_L))(rngs))
    assert (found[:, [0, 2]] == [0, 2]).all()
    orders, counts = np.unique(found[:, [1, 3, 4]], axis=0, return_counts=True)
    assert len(orders) == 6
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000 * 5 / 6)


def test_an_autoregressive_model_has_nothing_to_the_right():
    made = tiny.build(N, L, **AR)
    with pytest.raises(UserError, match="hyperschedule: got 'quenched.*nothing to the right is ever seen"):
        diagnostics.context(made, knowing(made), texts(4), draws=1)


# ---- calibration


@pytest.mark.parametrize("token", diagnostics.TOKENS)
def test_the_exact_posterior_is_calibrated_at_masks_and_tokens(token):
    made = tiny.build(N, L, **EPS)
    report = diagnostics.calibration(made, knowing(made), texts(400), token, bins=20, draws=2, batch=400)
    assert {row["at"] for row in report.rows} == {"masks", "tokens"}
    for row in report.rows:
        error = np.sqrt(row["confidence"] * (1 - row["confidence"]) / row["predictions"])
        assert abs(row["right"] - row["confidence"]) < 4 * error + 1e-6, row
    if token == "sampled":
        masks = [row["confidence"] for row in report.rows if row["at"] == "masks"]
        np.testing.assert_allclose(masks, sorted(LAW), atol=1e-6)
    sharp = diagnostics.calibration(made, knowing(made, sharpness=4.0), texts(400), token, draws=2, batch=400)
    name = "masks: expected calibration error"
    assert report.summary[name] < 0.03 < 0.2 < sharp.summary[name]


def test_tokens_that_are_certain_are_not_counted():
    made = tiny.build(N, L, noising__kind="absorb", noising__epsilon=None, loss__kind="absorb_nelbo")
    report = diagnostics.calibration(made, knowing(made), texts(20), draws=1)
    assert {row["at"] for row in report.rows} == {"masks"}


def test_every_process_has_a_posterior():
    made = tiny.build(
        N, L, noising__kind="uniform", noising__epsilon=None, loss__kind="nelbo", sampler__kind="ancestral"
    )
    report = diagnostics.calibration(made, knowing(made), texts(300), bins=5, draws=1, batch=300)
    assert {row["at"] for row in report.rows} == {"tokens"}
    assert report.summary["tokens: expected calibration error"] < 0.05


def test_unknown_tokens_and_bins_are_refused():
    made = tiny.build(N, L, **EPS)
    with pytest.raises(UserError, match="--token: got 'best'; allowed: 'sampled', 'top'"):
        diagnostics.calibration(made, {}, texts(4), "best")
    with pytest.raises(UserError, match="--bins: got 0"):
        diagnostics.calibration(made, {}, texts(4), bins=0)
    with pytest.raises(UserError, match="--windows: got 1; allowed: at least 2"):
        diagnostics.calibration(made, {}, texts(1))


# ---- corrections


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
    step = reverse.acs(made.process, eta=1.0, reading="cavity")
    report = diagnostics.repair(made, knowing(made), x0_WxL, step, share=EPSILON, calls=1, batch=1500)
    (row,), count = report.rows, x0_WxL.size
    assert (row["call"], row["level after"], row["tokens"]) == (1, 0, count)
    chances = {"wrong": EPSILON * (1 - 1 / N)} | dict(zip(diagnostics.CHANGES[2:4], expected_repair(), strict=True))
    for name, p in chances.items():
        assert abs(row[name] - p * count) < 4 * np.sqrt(count * p * (1 - p)), name
    assert report.summary["wrong -> right"] == row["wrong -> right"]


def test_every_call_of_a_repair_follows_its_table():
    """Wrong tokens after each call, against the product of the exact kernels: h = 1 - 1/level at eta 1."""
    made, x0_WxL = tiny.build(N, L, **EPS), texts(2000)
    step = reverse.acs(made.process, eta=1.0, reading="cavity")
    report = diagnostics.repair(made, knowing(made), x0_WxL, step, share=EPSILON, calls=4, batch=2000)
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
    step = reverse.acs(made.process, eta=0.0, reading="cavity")
    earlier, last = diagnostics.repair(made, knowing(made), texts(200), step, share=0.5, calls=2, batch=200).rows
    assert earlier["wrong -> right"] == earlier["right -> wrong"] == earlier["wrong -> other wrong"] == 0
    assert last["wrong -> right"] > 0 and last["right -> wrong"] > 0
    first, final = diagnostics.corrections(made, knowing(made), texts(300), step, draws=2, batch=300).rows
    assert (first["call"], final["call"]) == ("earlier", "last")
    assert first["wrong"] > 0 and first["wrong -> right"] == first["right -> wrong"] == 0
    assert final["wrong -> right"] > 0


def test_one_call_corrects_as_its_table_says():
    """Restored and damaged tokens of the earlier calls of ACS, against the exact kernel at the same noise."""
    made, x0_WxL = tiny.build(N, L, **EPS), texts(1000)
    step = reverse.acs(made.process, eta=1.0, reading="cavity")
    earlier, _ = diagnostics.corrections(made, knowing(made), x0_WxL, step, draws=1, batch=1000).rows
    noise = jax.jit(lambda rng: passes.noise(perplexity.in_steps(made), rng, jnp.asarray(x0_WxL), training=False))
    noised = noise(jax.random.key(5))
    here = np.asarray((noised.zt < N) & (noised.phase.alpha_s < 1))
    table = jax.vmap(lambda z, t, s: step.kernel(z, jnp.asarray(LAW, jnp.float32), t, s))
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
        diagnostics.repair(made, {}, texts(4), reverse.acs(made.process, eta=0.5), **given)


def test_a_window_of_many_levels_is_refused():
    made = tiny.build(N, L, **EPS | BLOCK | {"hyperschedule__kind": "slide"})
    with pytest.raises(UserError, match="hyperschedule.kind: got 'slide'; allowed: 'flat' or 'block'"):
        diagnostics.repair(made, {}, texts(4), reverse.acs(made.process, eta=0.5))


# ---- numbers


def test_z_counts_windows_not_positions():
    counts = dict.fromkeys(diagnostics.CHANGES, np.zeros((1, 3), int)) | {"wrong -> right": np.array([[4, 0, 2]])}
    assert diagnostics._changes(counts)["z"] == pytest.approx(2 / (2 / np.sqrt(3)))


@pytest.mark.parametrize(("calls", "nats"), [([1, 2], [2, 1]), ([1, 1, 2], [3, 2, 1]), ([1, 2, 3], [3, 2])])
def test_a_knee_needs_three_ascending_points(calls, nats):
    with pytest.raises(UserError, match="calls: got .*; allowed: at least three numbers of calls, ascending"):
        diagnostics.knee(calls, nats)
