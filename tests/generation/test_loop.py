"""The loops: cached against recomputed scores, what never changes, GPT as a special case, the data law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from hdlm_jax.diffusion import hyperschedules, noise_schedules, noising, reverse, samplers
from hdlm_jax.diffusion.hyperschedules import block, block_slide, flat, quenched, slide
from hdlm_jax.diffusion.rules import Move
from hdlm_jax.generation import loop, network, segments
from hdlm_jax.generation.chain import trailing_row
from hdlm_jax.generation.state import frame_steps
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models.attention import KV
from hdlm_jax.models.transformer import rows_at
from tests.generation.chains import (
    ABSORB,
    EPSILON_HYBRID,
    ORIGINS,
    L,
    N,
    assert_scores_agree,
    chain_of,
    generate,
    generated,
    given,
    greedy_absorb,
    jit,
    keys,
    levels_of_texts,
    noised_texts,
    prior_texts,
    random_params,
    recomputed_scores,
    score_every_step,
)

KEEPS_SOME = noise_schedules.linear(eps=0.1)  # pure noise holds clean tokens, so that trailing rows matter

# ---- cached scores are recomputed scores

RUNS = {
    "GPT": chain_of(quenched(L), "shifted"),
    "block": chain_of(block(L, 5, "5/2"), "shifted"),
    "slide": chain_of(slide(L, 6, "3/2")),
}
FEW = {
    "half a token a call": chain_of(slide(L, 3, "1/2"), "shifted", conditioning=8),
    "one window": chain_of(slide(L, L, 4), "shifted"),
    "block_slide": chain_of(block_slide(L, 5, 3, "3/2"), conditioning=8),
    "two groups a block": chain_of(block(L, 6, 3), "shifted", context_group=3),
    "a group a call": chain_of(slide(L, 4, 2), conditioning=8, context_group=2),
}
TRAILING = chain_of(slide(L, 4, 2), "shifted", schedule=KEEPS_SOME)


@functools.cache
def run_of(name):
    """The tokens before the first and after every step, float64 [T + 1, B, L]."""
    with jax.enable_x64():
        done, history = generate(RUNS[name], random_params(RUNS[name].config, jnp.float64))
    np.testing.assert_array_equal(done, history[-1])
    return np.concatenate([prior_texts(RUNS[name].process)[None], history])


@pytest.mark.parametrize("name", RUNS)
def test_along_a_run_cached_scores_are_recomputed_scores_and_what_the_loop_draws_from(name):
    """So its nested scans are the plain chain of calls of `window_rows`."""
    chain, texts = RUNS[name], run_of(name)
    with jax.enable_x64():
        scores, counts = assert_scores_agree(chain, random_params(chain.config, jnp.float64), texts[:-1], 1e-11)
        np.testing.assert_array_equal(texts[1:], drawn_by_hand(chain, texts[:-1], scores, counts))


@pytest.mark.parametrize("name", FEW)
def test_cached_scores_are_recomputed_scores(name):
    with jax.enable_x64():
        params = random_params(FEW[name].config, jnp.float64)
        assert_scores_agree(FEW[name], params, noised_texts(FEW[name].hs), 1e-11)


def drawn_by_hand(chain, x_TxBxL, scores_TxBxWxN, counts_TxBxW):
    """The tokens after every step, drawn from given scores at the levels of the table."""
    level_TxBxL, T = levels_of_texts(chain.hs), chain.hs.num_steps
    start_T = np.array([chain.hs.window(step)[0] for step in range(T)])
    place_TxBxW = np.array(ORIGINS)[None, :, None] + start_T[:, None, None] + np.arange(chain.hs.width)[None, None]
    at = lambda x_TxBxL: np.take_along_axis(x_TxBxL, np.minimum(place_TxBxW, L - 1), 2)
    alpha = np.asarray(chain.alpha(jnp.arange(chain.hs.tau_max + 1)))
    levels = at(level_TxBxL[:-1]), at(level_TxBxL[1:])
    move = Move(alpha[levels[0]], alpha[levels[1]], levels[1] < levels[0])
    columns = (at(x_TxBxL), scores_TxBxWxN, move)

    def one(rng, step, *row):
        return chain.rule.step(jax.random.fold_in(rng, step), *row, None)[0]

    steps = jax.vmap(jax.vmap(one, (0, None, 0, 0, 0)), (None, 0, 0, 0, 0))
    z_TxBxW = np.asarray(jit(steps)(keys(len(ORIGINS)), jnp.arange(T), *columns))
    after_TxBxL = np.array(x_TxBxL)
    for t, b, w in np.argwhere(counts_TxBxW):
        after_TxBxL[t, b, place_TxBxW[t, b, w]] = z_TxBxW[t, b, w]
    return after_TxBxL


def test_cached_scores_in_float32():
    assert_scores_agree(TRAILING, random_params(TRAILING.config), noised_texts(TRAILING.hs), 1e-5)


def test_a_cache_in_bfloat16_is_near():
    x_TxBxL = noised_texts(TRAILING.hs)
    fast, slow, counts = score_every_step(TRAILING, random_params(TRAILING.config), x_TxBxL, dtype=jnp.bfloat16)
    error = np.abs(fast - slow)[counts].max() / np.abs(slow[counts]).max()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize(
    ("activations", "option", "kept"),
    [("float32", "", "float32"), ("bfloat16", "", "bfloat16"), ("float32", "bfloat16", "bfloat16")],
)
def test_keys_and_values_are_kept_in_the_dtype_of_the_activations_or_as_asked(activations, option, kept, monkeypatch):
    caches, empty = [], kv_cache.empty
    monkeypatch.setattr(kv_cache, "empty", lambda *sizes: caches.append(empty(*sizes)) or caches[-1])
    chain = chain_of(slide(L, 4, 2), dtype=activations)
    run = functools.partial(loop.cached, chain._replace(cache_dtype=option), longest_prompt=7)
    jax.eval_shape(run, random_params(chain.config), keys(3), prior_texts(ABSORB), given())
    assert {x.dtype for x in jax.tree.leaves(caches)} == {jnp.dtype(kept)}


def irregular(step, position):
    """A table: positions start at irregular calls, skip a level and wait at another."""
    start_L = np.array([0, 0, 0, 1, 1, 3, 3, 4, 4, 4, 6, 7])
    return np.array([0, 1, 1, 3])[np.clip(start_L[position] + 3 - step, 0, 3)]


GRID = {
    "quenched": [quenched(L)],
    "block": [block(L, *of) for of in ((1, "1/2"), (1, 1), (3, 1), (4, 4), (5, "5/2"), (6, "3/2"), (L, 6))],
    "slide": [slide(L, *of) for of in ((1, "1/2"), (1, 1), (3, "1/2"), (4, 4), (4, 2), (6, "3/2"), (L, 3))],
    "block_slide": [block_slide(L, *of) for of in ((6, 4, 1), (5, 3, "3/2"), (4, 4, 2), (7, 2, "1/2"), (L, 5, 1))],
    "others": [flat(L, 4), hyperschedules.from_function(irregular, L, 10)],
}


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["aligned", "shifted"])
@pytest.mark.parametrize("kind", GRID)
def test_cached_scores_are_recomputed_scores_everywhere(kind, prediction):
    """Widths x rates x conditioning x trailing rows or none x prompts or none, of one length and mixed."""
    for i, hs in enumerate(GRID[kind]):
        plain = chain_of(hs, prediction)
        conditioned = chain_of(hs, prediction, conditioning=8)
        cases = [(plain, (11, 1, 0, 5)), (conditioned, ORIGINS)]
        if prediction == "shifted" and not trailing_row(plain):
            cases.append((chain_of(hs, prediction, schedule=KEEPS_SOME), ORIGINS))
        if i == 0:
            cases.append((conditioned, (0, 0)))
        for chain, origins in cases:
            with jax.enable_x64():
                params = random_params(chain.config, jnp.float64)
                assert_scores_agree(chain, params, noised_texts(hs, origins), 1e-11, starts=origins)


# ---- long texts


@pytest.mark.parametrize("name", ["block"])
def test_several_segments_give_the_tokens_of_one(name, monkeypatch):
    monkeypatch.setattr(segments, "SLOTS", 1)
    assert len(segments.plan(RUNS[name].hs, L, max(ORIGINS))) > 1
    with jax.enable_x64():
        _, history = generate(RUNS[name], random_params(RUNS[name].config, jnp.float64))
    np.testing.assert_array_equal(history, run_of(name)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT", "slide"])
def test_several_segments_give_the_tokens_of_one_for_the_others(name, monkeypatch):
    test_several_segments_give_the_tokens_of_one(name, monkeypatch)


@pytest.mark.parametrize("longest_prompt", [0, 5, 200])
@pytest.mark.parametrize(
    "hs",
    [quenched(300), block(300, 7, "7/2"), slide(300, 16, "8/5"), block_slide(300, 50, 8, 2), flat(300, 3)],
    ids=str,
)
def test_segments_follow_each_other_and_their_cache_holds_what_has_settled(hs, longest_prompt):
    plan = segments.plan(hs, hs.length, longest_prompt)
    assert [plan[0].first, *(segment.end for segment in plan)] == [s.first for s in plan] + [hs.num_steps]
    for segment in plan:
        filled = [min(longest_prompt + hs.window(step)[0], hs.length) for step in range(segment.first, segment.end)]
        grain = segments.granularity(hs.length)
        assert max(filled) <= segment.slots <= min(max(filled) // grain * grain + grain, hs.length)
        assert hs.kind != "block" or segment.first % hs.tau_max == 0
    slots = [segment.slots for segment in plan]
    assert slots == sorted(set(slots))  # a segment more is a program more to compile


# ---- what never changes


@pytest.mark.parametrize("name", RUNS)
def test_a_settled_token_never_changes(name):
    """Neither does a prompt's; texts end without a mask."""
    assert_settles_once(RUNS[name].hs, run_of(name))


GAMMA_HYBRID = noising.gamma_hybrid(N, 0.3)
ALL_ROWS = {
    "acs": chain_of(block(L, 4, 1), sampler=reverse.acs(EPSILON_HYBRID, 1.0), visibility="full"),
    "acs_published": chain_of(flat(L, 5), sampler=reverse.acs_published(EPSILON_HYBRID, 0.5), visibility="full"),
    "ancestral gamma": chain_of(
        slide(L, 4, 2), process=GAMMA_HYBRID, sampler=reverse.ancestral(GAMMA_HYBRID), visibility="full"
    ),
}


@pytest.mark.parametrize("name", ALL_ROWS)
def test_a_settled_token_never_changes_when_all_rows_are_fed(name):
    assert_settles_once(ALL_ROWS[name].hs, run_of_all_rows(name))


@functools.cache
def run_of_all_rows(name):
    chain = ALL_ROWS[name]
    _, history = generate(chain, random_params(chain.config), cached=False)
    return np.concatenate([prior_texts(chain.process)[None], history])


def assert_settles_once(hs, texts_TxBxL, origins=ORIGINS):
    level_TxBxL = levels_of_texts(hs, origins)
    changed = texts_TxBxL[1:] != texts_TxBxL[:-1]
    assert changed.any((0, 2)).all()
    assert not (changed & (level_TxBxL[1:] == level_TxBxL[:-1])).any()
    assert ((texts_TxBxL[-1] >= 0) & (texts_TxBxL[-1] < N)).all()


def test_a_text_is_the_same_alone_and_in_a_batch():
    """In the batch its prompt is neither the longest nor the shortest."""
    with jax.enable_x64():
        params = random_params(RUNS["slide"].config, jnp.float64)
        _, alone = generate(RUNS["slide"], params, rows=slice(1, 2))
    np.testing.assert_array_equal(alone, run_of("slide")[1:, 1:2])


def test_a_text_is_the_same_alone_and_in_a_batch_when_all_rows_are_fed():
    chain = ALL_ROWS["acs"]
    _, alone = generate(chain, random_params(chain.config), cached=False, rows=slice(1, 2))
    np.testing.assert_array_equal(alone, run_of_all_rows("acs")[1:, 1:2])


# ---- autoregression as a special case, and greedy twins


def gpt_greedy(config, params, prompt):
    """Greedy decoding of a causal GPT, one token and one row of keys and values at a time, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    H, D = config.heads, config.head_size
    memory = [([], []) for _ in range(config.blocks)]

    def norm(x, scale):
        x = x - x.mean()
        return x / np.sqrt((x * x).mean() + 1e-5) * scale

    def turn(x_HxD, position):
        angle = position * config.rotary_base ** (-np.arange(0, D, 2) / D)
        a, b = np.split(x_HxD, 2, -1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    def next_token(token, position):
        x = p["embedding"][token]
        for i, (past_k, past_v) in enumerate(memory):
            w = jax.tree.map(lambda x, i=i: x[i], p["blocks"])
            q, k, v = (norm(x, w["norm_attention"]["scale"]) @ w["qkv"]["kernel"]).reshape(3, H, D)
            past_k.append(turn(k, position))
            past_v.append(v)
            weight = np.exp(np.einsum("hd,shd->hs", turn(q, position), past_k) / np.sqrt(D))
            mean = np.einsum("hs,shd->hd", weight / weight.sum(1, keepdims=True), past_v)
            x = x + mean.reshape(-1) @ w["out"]["kernel"]
            h = norm(x, w["norm_mlp"]["scale"]) @ w["mlp_in"]["kernel"] + w["mlp_in"]["bias"]
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            x = x + h @ w["mlp_out"]["kernel"] + w["mlp_out"]["bias"]
        return int(np.argmax((norm(x, p["norm"]["scale"]) @ p["head_kernel"] + p["head_bias"])[: config.num_tokens]))

    text = [config.bos_id, *prompt]
    for i in range(config.length):
        predicted = next_token(text[i], i - 1)
        if i >= len(prompt):
            text.append(predicted)
    return text[1:]


def test_quenched_absorb_shifted_is_a_gpt():
    chain = greedy_absorb(quenched(L), "shifted")
    params, prompts = random_params(chain.config), np.asarray(prior_texts(ABSORB))
    expected = [gpt_greedy(chain.config, params, prompts[b, :origin].tolist()) for b, origin in enumerate(ORIGINS)]
    assert min(len(set(text)) for text in expected) > 2
    np.testing.assert_array_equal(generate(chain, params)[0], expected)
    np.testing.assert_array_equal(generate(chain, params, cached=False)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["aligned", "shifted"])
@pytest.mark.parametrize("hs", [quenched(L), block(L, 4, 4), slide(L, 5, 5), block_slide(L, 6, 2, 2)], ids=str)
def test_both_loops_give_the_same_greedy_text(hs, prediction):
    """Every step is the last of its position, so that nothing is drawn."""
    chain = greedy_absorb(hs, prediction)
    params = random_params(chain.config)
    np.testing.assert_array_equal(generate(chain, params)[1], generate(chain, params, cached=False)[1])


# ---- from the true posterior, the data law

PAIRS = np.random.default_rng(12).dirichlet(np.full(9, 2.0)).reshape(3, 3)  # joint law of texts of two tokens


def true_network(epsilon, epsilon_of_other):
    """Log of what the published loss teaches, [position, the other's token, own token, x]; 3 is the mask."""
    noised = np.concatenate([(1 - epsilon_of_other) * np.eye(3) + epsilon_of_other / 3, np.ones((3, 1))], 1)
    cavity = np.stack([noised.T @ PAIRS.T, noised.T @ PAIRS])  # x given the other's token, [position, token, x]
    shuffle = np.concatenate([np.eye(3) + 1 / 3, np.ones((1, 3))])
    out = cavity[:, :, None] * shuffle[None, None]
    return jnp.asarray(np.log(out / out.sum(-1, keepdims=True)), jnp.float32)


def know_the_truth(monkeypatch, table, visibility):
    """Puts the true network in the place of the transformer; a prefix model does not see to the right."""

    def forward(config, params, tokens_BxR, positions_BxR, attention, past=None, **options):
        first = positions_BxR <= 0
        right = jnp.roll(tokens_BxR, -1, 1) if visibility == "full" else 3
        other = jnp.where(first, right, jnp.roll(tokens_BxR, 1, 1))
        rows = jnp.zeros((len(tokens_BxR), config.heads, tokens_BxR.shape[1], config.head_size))
        return table[jnp.where(first, 0, 1), other, tokens_BxR], (KV(rows, rows),) * config.blocks

    def forward_to_few(config, params, tokens_BxR, positions_BxR, attention, leaving, attention_of, **options):
        hidden, kv = forward(config, params, tokens_BxR, positions_BxR, attention, **options)
        return functools.partial(rows_at, hidden[:, leaving]), kv

    pad = ((0, 0), (0, 0), (0, 1))
    monkeypatch.setattr(network, "forward", forward)
    monkeypatch.setattr(network, "forward_to_few", forward_to_few)
    monkeypatch.setattr(
        network, "logits", lambda config, params, scores: jnp.pad(scores, pad, constant_values=-jnp.inf)
    )


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_from_the_true_posterior_finished_texts_follow_the_data_law(eta, monkeypatch):
    """Both positions change at once: exact for many steps and a small epsilon."""
    assert_follows_the_data_law("full", flat(2, 48), 0.01, 0.01, eta, monkeypatch)


@pytest.mark.parametrize(
    ("visibility", "eta"),
    [
        ("prefix", 0.5),
        *(pytest.param(*of, marks=pytest.mark.slow) for of in (("prefix", 0.0), ("full", 0.0), ("full", 0.5))),
    ],
)
def test_one_after_the_other_they_follow_it_for_any_epsilon(visibility, eta, monkeypatch):
    assert_follows_the_data_law(visibility, slide(2, 1, "1/4"), 0.3, 0.0, eta, monkeypatch)


def assert_follows_the_data_law(visibility, hs, epsilon, epsilon_of_other, eta, monkeypatch):
    know_the_truth(monkeypatch, true_network(epsilon, epsilon_of_other), visibility)
    process, texts = noising.epsilon_hybrid(3, epsilon), 10_000
    chain = chain_of(hs, process=process, sampler=reverse.acs(process, eta), visibility=visibility, blocks=1)
    run = functools.partial(loop.cached, longest_prompt=0) if visibility == "prefix" else loop.recomputed
    inputs = (keys(texts), jnp.full((texts, 2), process.mask), jnp.zeros((texts, 2), bool))
    done = jax.jit(functools.partial(run, chain))(random_params(chain.config), *inputs).x
    counts = np.bincount(np.asarray(done) @ [3, 1], minlength=9)
    assert chisquare(counts, PAIRS.ravel() * texts).pvalue > 0.01


# ---- records, and calls that are left out


def test_a_record_keeps_the_tokens_after_every_few_calls_and_the_confidence_in_them():
    chain = RUNS["slide"]
    with jax.enable_x64():
        params = random_params(chain.config, jnp.float64)
        frames = generated(chain, params, frames=5).frames
    steps, T = frame_steps(chain, 5), chain.hs.num_steps
    assert steps == [0, 3, 6, 9, T] and T == 11
    np.testing.assert_array_equal(frames.tokens, run_of("slide")[steps])
    unknown = np.isnan(frames.confidence)
    begun = levels_of_texts(chain.hs)[steps] < chain.hs.tau_max
    np.testing.assert_array_equal(unknown, ~begun | np.asarray(given())[None])
    assert ((frames.confidence > 0) & (frames.confidence <= 1))[~unknown].all()


def test_confidence_is_the_probability_of_the_token_or_of_the_likeliest_at_a_mask():
    chain = greedy_absorb(block(L, 4, 2), "aligned")
    params = random_params(chain.config)
    frames = generated(chain, params, origins=(0, 0, 0)).frames
    _, scores = recomputed_scores(chain, params, frames.tokens[0], given((0, 0, 0)), jnp.int32(0))
    p = np.asarray(jax.nn.softmax(scores[..., :N], -1))[:, :4]
    np.testing.assert_allclose(frames.confidence[1][:, :4], p.max(-1), rtol=1e-4)  # greedy: both are the likeliest


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "recomputed"])
@pytest.mark.parametrize(("process", "calls"), [(ABSORB, 3), (EPSILON_HYBRID, 6)], ids=["absorb", "epsilon_hybrid"])
def test_calls_without_a_mask_to_fill_are_left_out(process, calls, cached):
    """At threshold 0+ a block needs its first call, and for shuffled tokens its last."""
    rule = samplers.build("threshold", process, threshold=1e-6)
    visibility = "prefix" if cached else "full"
    chain = chain_of(block(L, 4, 1), process=process, sampler=rule, visibility=visibility)
    params = random_params(chain.config)
    state = generated(chain, params, cached=cached)
    every = generated(chain._replace(rule=rule._replace(chance=None)), params, cached=cached)
    assert (int(state.calls), int(every.calls)) == (calls, chain.hs.num_steps)
    np.testing.assert_array_equal(state.frames.tokens, every.frames.tokens)


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "recomputed"])
def test_when_every_text_has_its_end_the_calls_end(cached):
    visibility = "prefix" if cached else "full"
    plain = chain_of(slide(L, 2, 1), process=ABSORB, sampler=reverse.ancestral(ABSORB), visibility=visibility)
    params = jax.tree.map(lambda x: 0.3 * x, random_params(plain.config))  # near uniform: every token is in some text
    whole = np.asarray(generated(plain, params, cached=cached).x)
    generated_BxL = np.where(np.asarray(given()), -1, whole)
    common = [t for t in range(N) if (generated_BxL == t).any(1).all()]
    assert common  # so drawn that a token is in all texts
    first_B = (generated_BxL == common[0]).argmax(1)
    state = generated(plain._replace(end=common[0]), params, cached=cached)
    settled_after = max(first - origin for first, origin in zip(first_B, ORIGINS, strict=True)) + 2
    assert int(state.calls) == settled_after < plain.hs.num_steps
    for row, (text, first) in enumerate(zip(whole, first_B, strict=True)):
        np.testing.assert_array_equal(state.x[row, : first + 1], text[: first + 1])


def test_a_rule_remembers_from_call_to_call_and_its_memory_moves_with_the_window():
    """Mask-Predict in blocks: cached and recomputed texts are equal where proposals are the likeliest tokens."""
    rule = samplers.build("mask_predict", ABSORB)
    chain = chain_of(block(L, 6, "3/2"), process=ABSORB, sampler=rule)
    chain = chain._replace(shape_logits=greedy_absorb(block(L, 6, "3/2"), "aligned").shape_logits)
    with jax.enable_x64():
        params = random_params(chain.config, jnp.float64)
        fast, slow = (generated(chain, params, cached=cached) for cached in (True, False))
    np.testing.assert_array_equal(fast.frames.tokens, slow.frames.tokens)
    assert (np.diff((np.asarray(fast.frames.tokens) == ABSORB.mask).sum(2), axis=0) < 0).any()
    remasked = (fast.frames.tokens[1:] == ABSORB.mask) & (fast.frames.tokens[:-1] != ABSORB.mask)
    assert remasked.any()
