"""From settings to a chain, and from prompts to texts."""

import math

import jax
import jax.numpy as jnp
import pytest

from hdlm_jax import config as configs
from hdlm_jax.data import tokenizers
from hdlm_jax.diffusion import hyperschedules
from hdlm_jax.errors import UserError
from hdlm_jax.generation import sampling
from hdlm_jax.models import parts as builders
from hdlm_jax.models.transformer import init
from tests.generation.chains import run_of_sampling

L = 10
TOKENIZER = tokenizers.bytes_tokenizer()
MASK = TOKENIZER.mask_id
SLIDE = {
    "data.length": L,
    "model.hidden": 8,
    "model.blocks": 1,
    "model.heads": 1,
    "model.visibility": "prefix",
    "hyperschedule.kind": "slide",
    "hyperschedule.width": 4,
    "hyperschedule.rate": "1",
    "noising.epsilon": 0.1,
}


@pytest.fixture(autouse=True)
def _compiled_fast(monkeypatch):
    monkeypatch.setattr(sampling, "_run", run_of_sampling)


def experiment(**overrides):
    """Parts and sampler block of a tiny prefix model that slides; `__` in a name stands for a dot."""
    fields = {name.replace("__", "."): value for name, value in overrides.items()}
    config = configs.override(configs.default(), SLIDE | fields)
    return builders.build(config, TOKENIZER.num_tokens, TOKENIZER.bos_id), config.sampler


def test_equal_settings_are_one_chain():
    """And so one compiled program: a chain is the static argument of it."""
    (parts, sampler), (_, same), (_, other) = experiment(), experiment(sampler__eta=0.25), experiment(sampler__eta=0.5)
    chain = sampling.chain(parts, hyperschedules.slide(L, 4, 2), sampler)
    assert sampling.chain(parts, hyperschedules.slide(L, 4, "2"), same) is chain
    assert sampling.chain(parts, hyperschedules.slide(L, 4, "2"), other) is not chain
    assert sampling.chain(parts, hyperschedules.slide(L, 4, 1), same) is not chain


def test_a_hook_sees_all_rows_of_a_window():
    """It may look at positions, as far as they have places in the window."""
    (parts, sampler), hs = experiment(), hyperschedules.slide(L, 4, 2)
    assert not sampling.chain(parts, hs, sampler).every_row
    assert sampling.chain(parts, hs, sampler, hook=lambda logits_BxWxN, x_BxL: logits_BxWxN).every_row


@pytest.mark.parametrize(
    ("overrides", "hs", "field"),
    [
        ({}, hyperschedules.slide(L, 5, 1), "hyperschedule.width: got 5.*at most 4"),
        ({}, hyperschedules.flat(L, 3), "hyperschedule.width: got 10.*at most 4"),
        (
            {},
            hyperschedules.from_function(lambda step, i: (step + i < L) * 1, L, L),
            "hyperschedule.kind.*left to right",
        ),
        ({}, hyperschedules.slide(L, 4, 1).with_prompt(2), "hyperschedule: got '2 given positions'"),
        ({"sampler__kind": "Acs"}, None, "sampler.kind: got 'Acs' .did you mean 'acs'"),
        ({"sampler__eta": -0.5}, None, "sampler.eta: got -0.5"),
        (
            {"noising__kind": "absorb", "noising__epsilon": None, "loss__kind": "absorb_nelbo"},
            None,
            "sampler.kind: got",
        ),
        ({"loss__kind": "epsilon_nelbo"}, None, "sampler.eta: got 0.25 for a run trained on epsilon_nelbo"),
    ],
)
def test_what_a_model_cannot_sample_is_refused_by_name(overrides, hs, field):
    parts, sampler = experiment(**overrides)
    with pytest.raises(UserError, match=field):
        sampling.chain(parts, hs or parts.hs, sampler)


@pytest.mark.parametrize(
    "overrides",
    [
        {"sampler__kind": "ancestral"},  # the experiment's eta is for the others
        {"loss__kind": "epsilon_nelbo", "sampler__kind": "ancestral"},
        {"loss__kind": "epsilon_nelbo", "sampler__eta": 0.0},
        {"loss__kind": "epsilon_nelbo", "sampler__untrained_correction": True},
    ],
)
def test_what_it_can_sample_is_not(overrides):
    parts, sampler = experiment(**overrides)
    chain = sampling.chain(parts, hyperschedules.block(L, 3, 1), sampler)
    assert chain.rule.name == overrides.get("sampler__kind", "acs")


def test_generation_starts_from_what_the_noise_schedule_leaves_of_a_text():
    """Half of pure noise is tokens here; after one call all positions but the first still are as they began."""
    half = {"noise_schedule__kind": "geometric", "noise_schedule__smin": 1e-3, "noise_schedule__smax": math.log(2)}
    parts, sampler = experiment(**half, sampler__kind="ancestral")
    chain = sampling.chain(parts, hyperschedules.quenched(L), sampler)
    out = sampling.draw(chain, init(parts.model, jax.random.key(0)), TOKENIZER, [""] * 100, L, record=True)
    start = out.trajectory.tokens[1][:, 1:]
    assert abs((start == MASK).mean() - 0.5) < 4 * 0.5 / math.sqrt(start.size)
    tokens = start[start < MASK]
    assert abs(tokens.mean() - (MASK - 1) / 2) < 4 * MASK / math.sqrt(12 * tokens.size)
    assert (out.tokens < MASK).all()


def test_prompts_of_any_length_open_the_texts_and_another_seed_or_text_compiles_nothing_new():
    parts, sampler = experiment()
    params, prompts = init(parts.model, jax.random.key(0)), ["", "abcd", "é"]

    def draw(prompts, seed):
        return sampling.draw(sampling.chain(parts, parts.hs, sampler), params, TOKENIZER, prompts, L, seed)

    out = draw(prompts, 0)
    programs = sampling._run._cache_size()
    again, other = draw(prompts, 0), draw(["xy", "z", "4444"], 1)
    assert sampling._run._cache_size() == programs
    assert all(text.startswith(prompt) for text, prompt in zip(out.texts, prompts, strict=True))
    assert out.texts == again.texts == [TOKENIZER.decode(row, end_of_text="\n") for row in out.tokens]
    assert (out.tokens.shape, out.tokens.dtype, out.trajectory) == ((3, L), jnp.int32, None)
    assert (other.tokens[:, 4:] != out.tokens[:, 4:]).mean() > 0.9
    assert (out.tokens < MASK).all()


@pytest.mark.parametrize("prompts", [[], ["a" * L], ["", "é" * (L // 2)]])
def test_no_prompt_at_all_and_prompts_that_leave_no_room_are_refused(prompts):
    parts, sampler = experiment()
    with pytest.raises(UserError, match=r"^prompt: got"):
        sampling.draw(sampling.chain(parts, parts.hs, sampler), {}, TOKENIZER, prompts, L)
