"""The loaded model: what users call, in memory and from a run folder."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hdlm_jax import config as configs
from hdlm_jax import lm as lms
from hdlm_jax.data import tokenizers
from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.errors import UserError
from hdlm_jax.generation import sampling
from hdlm_jax.generation.chain import Chain
from hdlm_jax.models import parts as builders
from hdlm_jax.models.transformer import TransformerConfig, init
from hdlm_jax.training.checkpoints import Checkpoints
from hdlm_jax.training.state import TrainState
from tests.generation.chains import jit, recomputed_scores, run_of_sampling

L = 12
TOKENIZER = tokenizers.bytes_tokenizer()
N = TOKENIZER.num_tokens
TINY = {
    "data.length": L,
    "model.hidden": 16,
    "model.blocks": 1,
    "model.heads": 2,
    "noising.epsilon": 0.1,
    "sampler.steps": 5,
}
SLIDE = {
    "model.visibility": "prefix",
    "model.prediction": "shifted",
    "hyperschedule.kind": "slide",
    "hyperschedule.width": 4,
    "hyperschedule.rate": "1",
}
GPT = SLIDE | {
    "hyperschedule.kind": "quenched",
    "hyperschedule.width": None,
    "hyperschedule.rate": None,
    "noising.kind": "absorb",
    "noising.epsilon": None,
    "loss.kind": "absorb_nelbo",
    "sampler.kind": "ancestral",
}


def model(overrides, random=True):
    """A model that was never trained; without `random` its head is zero and every token equally likely."""
    config = configs.override(configs.default(), TINY | overrides)
    parts = builders.build(config, N, TOKENIZER.bos_id)
    params = init(parts.model, jax.random.key(0))
    if random:
        leaves, tree = jax.tree.flatten(params)
        rng = np.random.default_rng(0)
        params = tree.unflatten([leaf + rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])
    return lms.LanguageModel(config, parts, params, TOKENIZER, step=0)


@pytest.fixture
def compiled_fast(monkeypatch):
    """The same program of generation, compiled without optimisation."""
    monkeypatch.setattr(sampling, "_run", run_of_sampling)


FULL, PREFIX, UNIFORM = model({}), model(SLIDE), model(GPT, random=False)


def tokens_of(text):
    return TOKENIZER.encode(text).tolist()


# ---- generate


def test_seeds_are_reproducible_and_equal_settings_compile_once():
    out = FULL.generate("ab", num_samples=3)
    programs = sampling._run._cache_size()
    again = FULL.generate("ab", num_samples=3, seed=0, sampler="acs", eta=0.25, hyperschedule="flat", steps=5)
    other = FULL.generate(["ab", "c", ""], seed=1, top_p=1.0, temperature=1)
    assert sampling._run._cache_size() == programs
    assert again.texts == out.texts
    np.testing.assert_array_equal(again.tokens, out.tokens)
    assert len(set(out.texts)) == 3
    assert not set(other.texts) & set(out.texts)
    assert all(text.startswith("ab") for text in out.texts)
    assert out.tokens.shape == (3, L)
    assert (out.tokens < N).all()
    assert out.hyperschedule == hyperschedules.flat(L, 5)


def test_a_prefix_model_takes_prompts_of_mixed_length_and_another_rate(compiled_fast):
    out = PREFIX.generate(["", "abcdefg", "xyz"], rate=2, length=L - 1, record=True)
    assert out.hyperschedule == hyperschedules.slide(L - 1, 4, 2)  # the width is the experiment's
    history = out.trajectory.tokens
    assert history.shape == (out.hyperschedule.num_steps + 1, 3, L - 1)
    np.testing.assert_array_equal(history[-1], out.tokens)
    assert (history[:, 1, :7] == tokens_of("abcdefg")).all()
    assert (history[:, 2, :3] == tokens_of("xyz")).all()
    assert (out.tokens < N).all()


def test_a_full_model_settles_blocks_in_order(compiled_fast):
    out = FULL.generate("ab", hyperschedule="block", width=5, rate="5/2", record=True)
    assert out.hyperschedule == hyperschedules.block(L, 5, "5/2")
    masked = out.trajectory.tokens[1:, 0] == N
    assert masked[:2, 7:].all()  # the second block has not begun
    assert not masked[1:, :7].any()  # the first is finished
    assert not masked[-1].any()


def test_dials_reach_the_sampler(compiled_fast):
    """Greedy, one position at a time: the seed has no say; the text is the argmax of the network's scores."""
    greedy = {"sampler": "ancestral", "temperature": 0, "hyperschedule": "block", "width": 1, "rate": 1}
    first, second = (FULL.generate("ab", seed=seed, **greedy) for seed in (0, 1))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    x_L = np.array([*tokens_of("ab"), *[N] * (L - 2)])
    x_L[2] = np.argmax(FULL.logits(x_L[None])[0, 2])
    np.testing.assert_array_equal(first.tokens[0, :3], x_L[:3])


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"temprature": 1.0}, "generate: got 'temprature' .did you mean 'temperature'"),
        ({"sampler": "asc"}, "sampler.kind: got 'asc' .did you mean 'acs'"),
        ({"sampler": "ancestral", "eta": 0.5}, "sampler.eta: got 0.5"),
        ({"eta": 2}, "sampler.eta: got 2"),
        ({"eta": "much"}, "sampler.eta: got 'much'"),
        ({"temperature": -1}, "sampler.temperature: got -1"),
        ({"top_p": 0}, "sampler.top_p: got 0"),
        ({"top_k": -1}, "sampler.top_k: got -1"),
        ({"hyperschedule": "slid"}, "hyperschedule.kind: got 'slid' .did you mean 'slide'"),
        ({"hyperschedule": "slide", "width": 5}, "hyperschedule.width: got 5.*at most 4"),
        ({"hyperschedule": "flat"}, "hyperschedule.width: got 12.*at most 4"),
        ({"hyperschedule": "quenched", "width": 3}, "hyperschedule.width"),
        ({"hyperschedule": "block", "width": 3}, "hyperschedule.rate: got None"),
        ({"rate": 3}, "hyperschedule.rate: got '3'"),
        ({"width": 13}, "hyperschedule.width: got 13"),
        ({"hyperschedule": hyperschedules.slide(L + 1, 4, 1)}, "hyperschedule.length: got 13"),
        ({"hyperschedule": hyperschedules.slide(L, 4, 1), "width": 2}, "width: got .2."),
        ({"hyperschedule": hyperschedules.slide(L, 4, 1).with_prompt(1)}, "hyperschedule: got '1 given positions'"),
        ({"prompt": "a" * L}, "prompt: got '12 tokens'"),
        ({"prompt": ["a", "bcde"], "length": 4}, "prompt: got '4 tokens'"),
        ({"prompt": []}, "prompt: got "),
        ({"length": 0}, "length: got 0"),
        ({"length": L + 1, "fixed": {3: "a"}}, "fixed: got .*nothing for texts past the trained length, 12"),
        ({"length": L + 1, "record": True}, "record: got True"),
        ({"prompt": ""}, "prompt: got ''; allowed: a text; leave it out"),
        ({"seed": [1, 2]}, "seed: got '2 seeds'; allowed: one, or one for each of the 1 texts"),
        ({"seed": -1}, "seed: got -1"),
        ({"fixed": {L - 1: "ab"}}, "fixed: got '2 tokens from position 11'; allowed: positions 0 .. 11"),
        ({"prompt": "ab", "fixed": {1: "ab"}}, "fixed: got .*taken: 1"),
        ({"guidance": 1.0}, "sampler.guidance: got 1.0; allowed: 0 for a prefix model"),
        ({"forbid": [N]}, "forbid: got 257"),
        ({"repetition_penalty": 0.5}, "sampler.repetition_penalty: got 0.5"),
        ({"length": 3}, "hyperschedule.width: got 4"),
        ({"num_samples": 0}, "num_samples: got 0"),
    ],
    ids=str,
)
def test_bad_input_names_its_field(given, field):
    with pytest.raises(UserError, match=field):
        PREFIX.generate(**given)


def test_a_shifted_model_needs_bos():
    with pytest.raises(UserError, match="model.bos_id"):
        TransformerConfig(num_tokens=5, length=4, hidden=8, blocks=1, heads=1, prediction="shifted")


def test_a_text_with_a_seed_of_its_own_is_the_same_alone_and_in_any_batch(compiled_fast):
    together = FULL.generate(["ab", "c", "def"], seed=[5, 6, 7])
    for prompt, seed, text in zip(["ab", "c", "def"], [5, 6, 7], together.tokens, strict=True):
        np.testing.assert_array_equal(FULL.generate(prompt, seed=seed).tokens[0], text)


def test_a_full_model_fills_in_and_a_prefix_model_says_what_it_does_not_see(compiled_fast):
    full = FULL.generate("ab", fixed={8: "yz"})
    assert bytes(full.tokens[0, [0, 1, 8, 9]].tolist()) == b"abyz" and full.notes == ()
    prefix = PREFIX.generate("ab", fixed={8: "yz"})
    assert bytes(prefix.tokens[0, [0, 1, 8, 9]].tolist()) == b"abyz"
    assert prefix.notes == (lms.PREFIX_IS_BLIND,)


def test_a_stream_joins_to_the_generated_text(compiled_fast):
    pieces = list(PREFIX.stream("ab", seed=2, rate=2, every=2))
    assert len(pieces) > 2
    assert "".join(pieces) == PREFIX.generate("ab", seed=2, rate=2).texts[0]


def test_a_prefix_model_goes_on_past_its_trained_length(compiled_fast):
    out = PREFIX.generate("ab", length=L + 9)
    assert out.tokens.shape == (1, L + 9) and (out.tokens < N).all()
    with pytest.raises(UserError, match="length: got 21; allowed: 1 .. 12, the trained length"):
        FULL.generate("ab", length=L + 9)


def test_a_full_model_corrects_finished_texts_and_others_are_refused(compiled_fast):
    out = FULL.correct("hello worl", patience=2)
    assert out.tokens.shape == (1, 10) and out.calls[0] >= 2
    assert (out.tokens[0] != tokens_of("hello worl")).sum() == out.replaced[0]
    assert out.accuracy[0, 1] >= out.accuracy[0, 0]
    with pytest.raises(UserError, match="model.visibility: got 'prefix'"):
        PREFIX.correct("hello")
    with pytest.raises(UserError, match="text: got '13 tokens'; allowed: 1 .. 12 tokens"):
        FULL.correct("a" * 13)


# ---- logits


def test_logits_are_scores_of_every_position_and_never_of_the_mask():
    tokens_BxL = np.array([[*tokens_of("hello"), *[N] * (L - 5)], [N] * L])
    scores = PREFIX.logits(tokens_BxL)
    assert (scores.shape, scores.dtype) == ((2, L, N + 1), jnp.float32)
    assert (scores[..., N] == -jnp.inf).all()
    assert np.isfinite(scores[..., :N]).all()
    with pytest.raises(UserError, match="tokens: got '13 positions'; allowed: at most 12"):
        PREFIX.logits(np.zeros((1, L + 1), int))


def test_logits_of_a_conditioned_model_are_what_a_flat_step_sees():
    conditioned = model(SLIDE | {"model.conditioning": 8, "model.interpolation": 0.5})
    hs, tokens_BxL = hyperschedules.flat(L, 4), np.random.default_rng(0).integers(0, N + 1, (2, L))
    parts = conditioned.parts
    chain = Chain(parts.model, hs, parts.schedule, parts.process, None)
    given_BxL, x_BxL = jnp.zeros((2, L), bool), jnp.asarray(tokens_BxL, jnp.int32)
    recomputed = jit(functools.partial(recomputed_scores, chain))
    phase, expected = recomputed(conditioned.params, x_BxL, given_BxL, jnp.int32(1))
    scores = conditioned.logits(tokens_BxL, parts.schedule.sigma(phase.alpha_t))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    with pytest.raises(UserError, match="sigma: got None"):
        conditioned.logits(tokens_BxL)


# ---- perplexity

TEXT = "A text of one line, longer than the name of any file may be. " * 6


def test_perplexity_of_the_uniform_model_is_its_number_of_tokens(tmp_path):
    """Exactly, where each position is predicted once; a text and a file of it count alike."""
    bound = UNIFORM.perplexity(TEXT, draws=2, batch=4)
    assert bound.nats_per_token == pytest.approx(math.log(N), rel=1e-5)
    assert bound.perplexity == pytest.approx(N, rel=1e-4)
    assert bound.bits_per_byte == pytest.approx(math.log2(N), rel=1e-5)
    assert bound.standard_error < 1e-5
    assert (bound.tokens, bound.num_bytes) == (len(TEXT), len(TEXT))
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    for path in (file, str(file)):
        assert UNIFORM.perplexity(path, draws=2, batch=4) == bound


def test_perplexity_of_a_random_model_is_an_estimate():
    bound = PREFIX.perplexity("A short text of two windows.", draws=3)
    assert bound.standard_error > 0.01
    assert bound.nats_per_token > math.log(N) - 1
    assert bound == PREFIX.perplexity("A short text of two windows.", draws=3, seed=0)
    assert bound != PREFIX.perplexity("A short text of two windows.", draws=3, seed=1)


@pytest.mark.parametrize(
    ("content", "given", "field"),
    [
        (None, {}, "text: cannot read"),
        (b"", {}, "text: got .* it is empty"),
        (b"a\0b", {}, "text: got .*NUL"),
        (b"\xff\xfe", {}, "text: got .*not UTF-8"),
        (b"abc", {"draws": 1}, "draws: got 1"),
        (b"abc", {"batch": 0}, "batch: got 0"),
    ],
)
def test_files_that_hold_no_text_are_refused(content, given, field, tmp_path):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=field):
        UNIFORM.perplexity(file, **given)


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match="text: got ''"):
        UNIFORM.perplexity("")


# ---- load


def test_a_run_folder_opens_as_the_model_that_was_saved(tmp_path):
    (tmp_path / "config.json").write_text(configs.to_json(PREFIX.config))
    TOKENIZER.save(tmp_path)
    mean = jax.tree.map(lambda x: x + 1, PREFIX.params)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, TrainState(jnp.int32(7), PREFIX.params, (), mean))
    for weights, params in (("raw", PREFIX.params), ("ema", mean)):
        opened = lms.load(tmp_path, weights)
        jax.tree.map(np.testing.assert_array_equal, opened.params, params)
        assert opened.step == 7
        assert opened.parts.model == PREFIX.parts.model
        assert opened.parts.hs == PREFIX.parts.hs
        assert configs.to_json(opened.config) == configs.to_json(PREFIX.config)
    with pytest.raises(UserError, match="weights: got 'best'"):
        lms.load(tmp_path, "best")


def test_what_is_no_run_folder_or_holds_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        lms.load(tmp_path)
    (tmp_path / "config.json").write_text(configs.to_json(PREFIX.config))
    with pytest.raises(UserError, match="tokenizer: .*no readable tokenizer"):
        lms.load(tmp_path)
    TOKENIZER.save(tmp_path)
    with pytest.raises(UserError, match="checkpoints: got "):
        lms.load(tmp_path)


def test_another_sampler_leaves_the_dials_of_the_experiments_own_behind():
    absorb = {"noising.kind": "absorb", "noising.epsilon": None, "loss.kind": "absorb_nelbo"}
    lm = model(absorb | {"sampler.kind": "remdm_loop", "sampler.t_on": 0.5, "sampler.temperature": 0.9})
    own, other = (lm._with_dials(*given).sampler for given in ((None, {}), ("threshold", {"threshold": 0.8})))
    assert (own.kind, own.t_on, own.threshold, own.temperature) == ("remdm_loop", 0.5, None, 0.9)
    assert (other.kind, other.t_on, other.threshold, other.temperature) == ("threshold", None, 0.8, 0.9)
