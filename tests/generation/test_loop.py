"""The loops: cached against recomputed scores, what never changes, GPT as a special case, the data law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from hdlm_jax.diffusion import hyperschedules, noise_schedules, noising, reverse
from hdlm_jax.diffusion.categorical import filter_logits
from hdlm_jax.diffusion.hyperschedules import block, block_slide, flat, quenched, slide
from hdlm_jax.generation import loop
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models.attention import KV
from hdlm_jax.models.transformer import TransformerConfig, init, unstacked

N, L = 6, 12
ORIGINS = (0, 3, 7)
EPSILON_HYBRID, ABSORB = noising.epsilon_hybrid(N, 0.2), noising.absorb(N)
KEEPS_SOME = noise_schedules.linear(eps=0.1)  # pure noise holds clean tokens, so that trailing rows matter

# compilation is what these tests spend their time on
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def chain_of(hs, prediction="aligned", *, conditioning=0, schedule=None, process=EPSILON_HYBRID, sampler=None, **model):
    """A small chain, by default of a prefix model sampled with corrections."""
    config = TransformerConfig(
        **{"hidden": 16, "blocks": 2, "heads": 2, "vocabulary_multiple": 8, "visibility": "prefix"} | model,
        num_tokens=process.num_tokens,
        length=hs.length,
        prediction=prediction,
        bos_id=process.num_tokens - 1,
        conditioning=conditioning,
        interpolation=0.3 if conditioning else 0.0,
    )
    sampler = sampler or reverse.acs(EPSILON_HYBRID, 0.5)
    return loop.Chain(config, hs, schedule or noise_schedules.linear(), process, sampler)


def greedy_absorb(hs, prediction, **model):
    """Nothing is left to chance where every step is its position's last."""
    chain = chain_of(hs, prediction, process=ABSORB, sampler=reverse.ancestral(ABSORB), **model)
    return chain._replace(shape_logits=functools.partial(filter_logits, temperature=0.0))


def random_params(config, dtype=jnp.float32):
    """Parameters far from their start: no zero head, no zero modulation, no norm of ones."""
    rng = np.random.default_rng(1)

    def random(path, leaf):
        fan_in = leaf.shape[-2] if "kernel" in path[-1].key else 1
        return jnp.asarray(rng.normal(0, 1.5 * fan_in**-0.5, leaf.shape), dtype)

    return jax.tree.map_with_path(random, jax.eval_shape(lambda: init(config, jax.random.key(0))))


def relative_positions(origins=ORIGINS):
    """[B, L], negative inside the prompts."""
    return np.arange(L)[None] - np.array(origins)[:, None]


def levels_of_texts(hs, origins=ORIGINS):
    """Level of every position of every text at every step, [T + 1, B, L], from the table of levels."""
    relative_BxL = relative_positions(origins)
    return np.where(relative_BxL[None] < 0, 0, np.asarray(hs.levels)[:, np.maximum(relative_BxL, 0)])


def prior_texts(process, origins=ORIGINS):
    """What generation starts from: prompts of random tokens, then masks."""
    x_BxL = np.random.default_rng(0).integers(0, N, (len(origins), L))
    return jnp.asarray(np.where(relative_positions(origins) < 0, x_BxL, process.mask), jnp.int32)


def noised_texts(hs, origins=ORIGINS):
    """Tokens before every step [T, B, L]: settled ones fixed, the others drawn anew, masks and tokens alike."""
    rng, level_TxBxL = np.random.default_rng(0), levels_of_texts(hs, origins)[:-1]
    token_TxBxL = rng.integers(0, N, level_TxBxL.shape)
    noise_TxBxL = np.where(rng.random(level_TxBxL.shape) < 0.5, N, token_TxBxL)
    return jnp.asarray(np.where(level_TxBxL == 0, token_TxBxL[:1], noise_TxBxL), jnp.int32)


def keys(count, seed=3):
    return jax.random.split(jax.random.key(seed), count)


def generate(chain, params, origins=ORIGINS, rows=slice(None), cached=True, **options):
    """Finished tokens [B, L] and tokens after every step [T, B, L] of some rows of a batch of prompts."""
    if cached:
        options["longest_prompt"] = max(origins[rows])
    run = functools.partial(loop.cached if cached else loop.recomputed, chain, record=True, **options)
    inputs = (keys(len(origins)), prior_texts(chain.process, origins), jnp.array(origins, jnp.int32))
    return [np.asarray(x) for x in jit(run)(params, *(x[rows] for x in inputs))]


def score_every_step(chain, params, x_TxBxL, origins=ORIGINS, dtype=None):
    """Scores of every call's window, cached and recomputed [T, B, W, N], and which rows count [T, B, W]."""
    hs, origin_B, settling = chain.hs, jnp.array(origins, jnp.int32), loop.settling_rows(chain)

    def run(params, x_TxBxL):
        per_block = unstacked(chain.config, params)
        cache = kv_cache.empty(chain.config, len(origins), L, dtype or params["embedding"].dtype)
        if max(origins):
            cache = loop._prefill(chain, per_block, cache, x_TxBxL[0], max(origins))

        def body(cache, inputs):
            step, x_BxL = inputs
            fast, cache = loop.window_logits(chain, per_block, cache, x_BxL, origin_B, step, settling)
            _, slow = loop.recomputed_logits(chain, params, x_BxL, origin_B, step)
            relative_W = hs.window(step)[0] + jnp.arange(hs.width)
            place_BxW = origin_B[:, None] + relative_W[None]
            counts = (place_BxW < L) & (relative_W < hs.window(step)[1])[None]
            slow = jnp.take_along_axis(slow, jnp.minimum(place_BxW, L - 1)[..., None], 1)
            return cache, (fast[..., :N], slow[..., :N], counts)

        return jax.lax.scan(body, cache, (jnp.arange(hs.num_steps), x_TxBxL))[1]

    return [np.asarray(x) for x in jit(run)(params, x_TxBxL)]


def assert_scores_agree(chain, params, x_TxBxL, tolerance, **options):
    """Cached and recomputed scores differ by no more than a share of their scale."""
    fast, slow, counts = score_every_step(chain, params, x_TxBxL, **options)
    assert counts.any((0, 2)).all()
    assert slow[counts].std() > 0.3
    np.testing.assert_allclose(fast[counts], slow[counts], rtol=0, atol=tolerance * np.abs(slow[counts]).max())
    return fast, counts


# ---- cached scores are recomputed scores

RUNS = {
    "GPT": chain_of(quenched(L), "shifted"),
    "block": chain_of(block(L, 5, "5/2"), "shifted", conditioning=8),
    "slide": chain_of(slide(L, 6, "3/2")),
}
FEW = {
    "half a token a call": chain_of(slide(L, 3, "1/2"), "shifted"),
    "one window": chain_of(slide(L, L, 4), "shifted"),
    "block_slide": chain_of(block_slide(L, 5, 3, "3/2"), conditioning=8),
}
TRAILING = chain_of(slide(L, 4, 2), "shifted", conditioning=8, schedule=KEEPS_SOME)


@functools.cache
def run_of(name):
    """The tokens before the first and after every step, float64 [T + 1, B, L]."""
    with jax.enable_x64():
        done, history = generate(RUNS[name], random_params(RUNS[name].config, jnp.float64))
    np.testing.assert_array_equal(done, history[-1])
    return np.concatenate([prior_texts(RUNS[name].process)[None], history])


@pytest.mark.parametrize("name", RUNS)
def test_along_a_run_cached_scores_are_recomputed_scores_and_what_the_loop_draws_from(name):
    """So its nested scans are the plain chain of calls of `window_logits`."""
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
    columns = (at(x_TxBxL), scores_TxBxWxN, alpha[at(level_TxBxL[:-1])], alpha[at(level_TxBxL[1:])])

    def one(rng, step, *row):
        return chain.reverse.step(jax.random.fold_in(rng, step), *row)

    steps = jax.vmap(jax.vmap(one, (0, None, 0, 0, 0, 0)), (None, 0, 0, 0, 0, 0))
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
    [("float32", None, "f32"), ("bfloat16", None, "bf16"), ("float32", jnp.bfloat16, "bf16")],
)
def test_keys_and_values_are_kept_in_the_dtype_of_the_activations_or_as_asked(activations, option, kept):
    chain = chain_of(slide(L, 4, 2), dtype=activations)
    run = functools.partial(loop.cached, chain, longest_prompt=7, cache_dtype=option)
    inputs = (keys(3), prior_texts(ABSORB), jnp.array(ORIGINS, jnp.int32))
    jaxpr = str(jax.make_jaxpr(run)(random_params(chain.config), *inputs))
    assert f":{kept}[3,{L},2,8]" in jaxpr
    if option is None:
        assert f":{'bf16' if kept == 'f32' else 'f32'}[3,{L},2,8]" not in jaxpr


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
    """Widths x rates x conditioning x noise that keeps some tokens x prompts of one length or mixed."""
    for hs in GRID[kind]:
        for conditioning, schedule in ((0, None), (8, None), (8, KEEPS_SOME)):
            chain = chain_of(hs, prediction, conditioning=conditioning, schedule=schedule)
            with jax.enable_x64():
                params = random_params(chain.config, jnp.float64)
                for origins in (ORIGINS, (0, 0)) if conditioning == 0 else ((11, 1, 0, 5),):
                    assert_scores_agree(chain, params, noised_texts(hs, origins), 1e-11, origins=origins)


# ---- long texts


@pytest.mark.parametrize("name", ["block"])
def test_several_segments_give_the_tokens_of_one(name, monkeypatch):
    monkeypatch.setattr(loop, "SEGMENT", 4)
    assert len(loop._plan(RUNS[name], L, max(ORIGINS))) > 1
    with jax.enable_x64():
        _, history = generate(RUNS[name], random_params(RUNS[name].config, jnp.float64))
    np.testing.assert_array_equal(history, run_of(name)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT", "slide"])
def test_several_segments_give_the_tokens_of_one_for_the_others(name, monkeypatch):
    test_several_segments_give_the_tokens_of_one(name, monkeypatch)


@pytest.mark.parametrize("longest_prompt", [0, 5, 200])
@pytest.mark.parametrize(
    "hs", [quenched(300), block(300, 7, "7/2"), slide(300, 16, "8/5"), block_slide(300, 50, 8, 2), flat(300, 3)], ids=str
)
def test_segments_follow_each_other_and_their_cache_holds_what_has_settled(hs, longest_prompt):
    plan = loop._plan(chain_of(hs), hs.length, longest_prompt)
    assert [plan[0].first, *(segment.end for segment in plan)] == [s.first for s in plan] + [hs.num_steps]
    for segment in plan:
        filled = [min(longest_prompt + hs.window(step)[0], hs.length) for step in range(segment.first, segment.end)]
        assert max(filled) <= segment.slots <= min(max(filled) // loop.SEGMENT * loop.SEGMENT + loop.SEGMENT, hs.length)
        assert hs.kind != "block" or segment.first % hs.tau_max == 0


# ---- what never changes


@pytest.mark.parametrize("name", RUNS)
def test_a_settled_token_never_changes(name):
    """Neither does a prompt's; texts end without a mask."""
    assert_settles_once(RUNS[name].hs, run_of(name))


@pytest.mark.parametrize(
    ("hs", "process", "sampler"),
    [
        (block(L, 4, 1), EPSILON_HYBRID, reverse.acs(EPSILON_HYBRID, 1.0)),
        (flat(L, 5), EPSILON_HYBRID, reverse.acs_published(EPSILON_HYBRID, 0.5)),
        (slide(L, 4, 2), noising.gamma_hybrid(N, 0.3), reverse.ancestral(noising.gamma_hybrid(N, 0.3))),
    ],
    ids=["acs", "acs_published", "ancestral gamma"],
)
def test_a_settled_token_never_changes_when_all_rows_are_fed(hs, process, sampler):
    chain = chain_of(hs, process=process, sampler=sampler, visibility="full")
    _, history = generate(chain, random_params(chain.config), cached=False)
    assert_settles_once(hs, np.concatenate([prior_texts(process)[None], history]))


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
    chain = chain_of(flat(L, 4), visibility="full")
    params = random_params(chain.config)
    _, history = generate(chain, params, cached=False)
    _, alone = generate(chain, params, cached=False, rows=slice(1, 2))
    np.testing.assert_array_equal(alone, history[:, 1:2])


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
        for i, (keys, values) in enumerate(memory):
            w = jax.tree.map(lambda x, i=i: x[i], p["blocks"])
            q, k, v = (norm(x, w["norm_attention"]["scale"]) @ w["qkv"]["kernel"]).reshape(3, H, D)
            keys.append(turn(k, position))
            values.append(v)
            weight = np.exp(np.einsum("hd,shd->hs", turn(q, position), keys) / np.sqrt(D))
            mean = np.einsum("hs,shd->hd", weight / weight.sum(1, keepdims=True), values)
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
        rows = jnp.zeros((*tokens_BxR.shape, config.heads, config.head_size))
        return table[jnp.where(first, 0, 1), other, tokens_BxR], (KV(rows, rows),) * config.blocks

    pad = ((0, 0), (0, 0), (0, 1))
    monkeypatch.setattr(loop, "forward", forward)
    monkeypatch.setattr(loop, "logits", lambda config, params, scores: jnp.pad(scores, pad, constant_values=-jnp.inf))


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize(
    ("visibility", "hs", "epsilon", "epsilon_of_other"),
    [
        ("full", flat(2, 48), 0.01, 0.01),  # both change at once: exact for many steps and a small epsilon
        ("full", slide(2, 1, "1/4"), 0.3, 0.0),  # one after the other: exact
        ("prefix", slide(2, 1, "1/4"), 0.3, 0.0),
    ],
    ids=["flat", "one after the other", "cached"],
)
def test_from_the_true_posterior_finished_texts_follow_the_data_law(
    visibility, hs, epsilon, epsilon_of_other, eta, monkeypatch
):
    know_the_truth(monkeypatch, true_network(epsilon, epsilon_of_other), visibility)
    process, texts = noising.epsilon_hybrid(3, epsilon), 10_000
    chain = chain_of(hs, process=process, sampler=reverse.acs(process, eta), visibility=visibility, blocks=1)
    run = functools.partial(loop.cached, longest_prompt=0) if visibility == "prefix" else loop.recomputed
    inputs = (keys(texts), jnp.full((texts, 2), process.mask), jnp.zeros(texts, jnp.int32))
    done, _ = jax.jit(functools.partial(run, chain))(random_params(chain.config), *inputs)
    counts = np.bincount(np.asarray(done) @ [3, 1], minlength=9)
    print(chisquare(counts, PAIRS.ravel() * texts))
    assert chisquare(counts, PAIRS.ravel() * texts).pvalue > 0.01
