"""Snapshots of a generation end in the text that `generate` gives, and settled pieces join to it."""

import jax
import numpy as np
import pytest

from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.generation import sampling, streaming
from hdlm_jax.models.transformer import init
from tests.generation.test_sampling import TOKENIZER, L, _compiled_fast, experiment  # noqa: F401

BLOCK, SLIDE = hyperschedules.block(L, 4, 2), hyperschedules.slide(L, 4, 1)


@pytest.mark.parametrize(("hs", "every"), [(BLOCK, 1), (SLIDE, 3)], ids=["block", "slide"])
def test_the_last_snapshot_is_the_generated_text_and_the_pieces_join_to_it(hs, every):
    parts, sampler = experiment()
    params = init(parts.model, jax.random.key(0))
    chain = sampling.chain(parts, hs, sampler)
    whole = sampling.draw(chain, params, TOKENIZER, ["ab"], L, seed=4, record=True)
    shots = list(streaming.snapshots(chain, params, TOKENIZER, "ab", L, 4, every))
    steps = [shot.step for shot in shots]
    assert steps[0] == 0 and steps[-1] == hs.num_steps and set(np.diff(steps)) <= {*range(1, every + 1)}
    for shot in shots:
        np.testing.assert_array_equal(shot.tokens, whole.trajectory.tokens[shot.step, 0])
        np.testing.assert_array_equal(shot.levels, whole.trajectory.levels()[shot.step, 0])
    assert [shot.finished for shot in shots] == [False] * (len(shots) - 1) + [True]
    pieces = list(streaming.settled_text(iter(shots), TOKENIZER))
    assert len(pieces) > 2 and all(pieces)
    assert "".join(pieces) == whole.texts[0]


def test_a_stream_ends_with_its_text():
    parts, sampler = experiment()
    params, end = init(parts.model, jax.random.key(0)), 120
    plain = sampling.draw(sampling.chain(parts, SLIDE, sampler), params, TOKENIZER, [""], L, seed=0)
    end = int(plain.tokens[0, 3])
    chain = sampling.chain(parts, SLIDE, sampler, end=end)
    shots = list(streaming.snapshots(chain, params, TOKENIZER, "", L, 0, 1))
    length = int((plain.tokens[0] == end).argmax()) + 1
    assert shots[-1].finished and shots[-1].length == length
    assert shots[-1].step < SLIDE.num_steps
    np.testing.assert_array_equal(shots[-1].tokens[:length], plain.tokens[0, :length])


def test_bad_input_is_refused_before_anything_runs():
    parts, sampler = experiment()
    with pytest.raises(Exception, match="prompt: got '10 tokens'"):
        streaming.snapshots(sampling.chain(parts, SLIDE, sampler), {}, TOKENIZER, "a" * L, L, 0, 1)
