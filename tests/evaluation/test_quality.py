"""What a judge makes of texts."""

import jax
import numpy as np
import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.evaluation import quality
from hdlm_jax.models import layouts, transformer
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
