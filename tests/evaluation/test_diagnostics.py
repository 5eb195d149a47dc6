"""Diagnostics of networks whose answers are known: the exact posterior of independent tokens, a bag of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import diagnostics
from tests.evaluation.known import BLOCK, EPS, LAW, L, N, knowing, texts
from tests.models import tiny

AR = {"model__visibility": "prefix", "model__prediction": "shifted", "hyperschedule__kind": "quenched"}
AR |= {"noising__kind": "absorb", "loss__kind": "absorb_nelbo", "sampler__kind": "ancestral", "noising__epsilon": None}


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
        error = np.sqrt(row["confidence"] * (1 - row["confidence"]) / row["count"])
        assert abs(row["accuracy"] - row["confidence"]) < 4 * error + 1e-6, row
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


# ---- the knee


@pytest.mark.parametrize(
    ("calls", "nats", "expected"),
    [
        ([1, 2, 4, 8], [4.0, 2.0, 1.9, 1.8], 1),
        ([8, 4, 2, 1], [1.8, 1.9, 2.0, 4.0], 2),  # in any order
        ([1, 2, 4], [3.0, 2.0, 1.0], None),  # a straight line on the log scale
        ([1, 2, 4], [3.0, 2.9, 1.0], None),  # calls pay ever more
        ([1, 2], [3.0, 1.0], None),
        ([1, 2, 4], [1.0, 1.0, 1.0], None),
    ],
)
def test_the_knee_is_where_calls_stop_paying(calls, nats, expected):
    assert diagnostics.knee(calls, nats) == expected
