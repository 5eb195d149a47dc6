"""What a judge makes of texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import quality
from hdlm_jax.generation.trajectory import Trajectory
from hdlm_jax.models import layouts, transformer
from hdlm_jax.models.attention import dense
from tests.models import tiny

AR = {"hyperschedule__kind": "quenched", "noising__kind": "absorb", "loss__kind": "absorb_nelbo"}
AR |= {"model__prediction": "shifted", "model__visibility": "prefix", "sampler__kind": "ancestral"}


def test_an_autoregressive_judge_is_the_chain_rule():
    made = tiny.build(5, 6, **AR)
    params = tiny.random_params(made.model)
    tokens_BxL = np.random.default_rng(0).integers(0, 5, (3, 6)).astype(np.int32)
    rows = layouts.causal(made.model, tokens_BxL)
    hidden, _ = transformer.forward(made.model, params, rows.tokens, rows.positions, rows.attention)
    nats = -jax.nn.log_softmax(transformer.logits(made.model, params, hidden)[..., :5], axis=-1)
    expected = np.take_along_axis(np.asarray(nats), tokens_BxL[..., None], -1)[..., 0].mean(1)
    np.testing.assert_allclose(quality.judged(made, params, tokens_BxL, draws=1, seed=0), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((1, 5), int), r"length: got 5; allowed: the judge's 6"),
        (np.full((1, 6), 5), r"tokens: got 5; allowed"),
    ],
)
def test_texts_that_a_judge_cannot_read_are_refused(tokens, message):
    made = tiny.build(5, 6, **AR)
    with pytest.raises(UserError, match=message):
        quality.judged(made, {}, tokens, draws=1, seed=0)


def test_a_judge_that_fails_gives_no_number():
    made = tiny.build(5, 6, **AR)
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), tiny.random_params(made.model))
    with pytest.raises(UserError, match="--judge: got 'nats that are not finite'"):
        quality.judged(made, params, np.zeros((2, 6), np.int32), draws=1, seed=0)


FULL = {"noising__epsilon": 0.1}
GROUPS = {"model__visibility": "prefix", "hyperschedule__kind": "block", "hyperschedule__width": 2}
GROUPS |= {"hyperschedule__rate": "1", "model__context_group": 2, "noising__epsilon": 0.1, "loss__origin_share": 0.0}


@pytest.mark.parametrize(("fields", "sees"), [(AR, 1), (GROUPS, 2), (FULL, 99)], ids=["AR", "groups of 2", "full"])
def test_features_are_the_mean_row_of_the_settled_text(fields, sees):
    made = tiny.build(5, 6, **fields)
    params = tiny.random_params(made.model)
    tokens_BxL = np.random.default_rng(0).integers(0, 5, (40, 6)).astype(np.int32)
    shifted = made.model.prediction == "shifted"
    held = np.pad(tokens_BxL, ((0, 0), (shifted, 0)), constant_values=tiny.BOS)
    row_R = np.arange(held.shape[1])
    visible = jnp.asarray(row_R[None, :] // sees <= row_R[:, None] // sees)[None]
    positions = jnp.broadcast_to(row_R - shifted, held.shape)
    hidden, _ = transformer.forward(made.model, params, jnp.asarray(held), positions, dense(visible))
    np.testing.assert_allclose(quality.features(made, params, tokens_BxL), hidden.mean(1), rtol=1e-4, atol=1e-5)


def test_corrections_count_where_a_token_became_another():
    tokens = np.array([[[5, 5, 5, 1]], [[5, 5, 1, 1]], [[2, 5, 1, 1]], [[2, 3, 0, 1]]])  # 5 is the mask
    given = np.array([[False, False, False, True]])
    confidence = np.zeros(tokens.shape, np.float32)
    hs = hyperschedules.flat(length=4, steps=3)
    trajectory = Trajectory(np.arange(4), tokens, confidence, given, np.zeros(1, np.int32), hs, mask=5)
    assert quality.corrected_share(trajectory) == pytest.approx(1 / 3)
