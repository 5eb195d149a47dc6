"""Block-causal and full context, as the published models were trained: the authors' masks, and generation with them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hdlm_jax as hdlm
from hdlm_jax.diffusion import visibility
from hdlm_jax.generation import loop, sampling
from tests.generation.chains import recomputed_scores

ROW = np.arange(32)


@pytest.mark.parametrize(
    ("mask", "start", "stop", "group"),
    [("m1_block8_step13_causal_full", 8, 16, 1), ("m2_block8_step20_blockcausal_full", 16, 24, 8)],
)
def test_rows_see_what_the_authors_masks_let_them(goldens, mask, start, stop, group):
    theirs = ~goldens["epsilon"][f"mask/{mask}"]
    ours = visibility.one_text(ROW[:, None], ROW[None, :], start, stop, group)
    np.testing.assert_array_equal(ours[:stop], theirs[:stop])
    np.testing.assert_array_equal(ours[stop:], np.eye(32, dtype=bool)[stop:])  # worthless rows, not read


def test_full_context_lets_settled_rows_see_all_settled_rows(goldens):
    theirs = ~goldens["epsilon"]["mask/m3_simple8_step17_full_causal"]  # settled: the first 9
    ours = visibility.one_text(ROW[:, None], ROW[None, :], 9, 17, 32)
    np.testing.assert_array_equal(ours[:9], theirs[:9])


def test_generation_runs_the_network_as_published(imported, goldens):
    """The scores of a generation step are the authors' logits under the mask of that step."""
    model, io = hdlm.load(imported["epsilon"]), goldens["epsilon"]
    chain = sampling.chain(model.parts, model.parts.hs, model.config.sampler)
    assert chain.hs.window(19) == (16, 24)  # their step 20 counts from 1
    x_BxL, given_BxL = jnp.asarray(io["tokens"], jnp.int32), jnp.zeros(io["tokens"].shape, bool)
    step = jax.jit(lambda x, step: recomputed_scores(chain, model.params, x, given_BxL, step)[1])
    theirs = io["logits/m2_block8_step20_blockcausal_full"]
    np.testing.assert_allclose(step(x_BxL, jnp.int32(19))[:, :24, :96], theirs[:, :24, :96], atol=2e-5)


def test_generation_with_groups_recomputes_every_row(imported, monkeypatch):
    """Settled rows change while others settle, so that a cache would hold wrong rows."""
    model, used = hdlm.load(imported["epsilon"]), []
    monkeypatch.setattr(loop, "recomputed", lambda *_: used.append("recomputed"))
    monkeypatch.setattr(loop, "cached", lambda *_: used.append("cached"))
    for inexact in (True, False):
        config = replace(model.parts.model, inexact_context=inexact)
        chain = sampling.chain(model.parts._replace(model=config), model.parts.hs, model.config.sampler)
        sampling._run.__wrapped__(chain, 0, 0, model.params, None, None, None)
    assert used == ["recomputed", "cached"]
