"""The transformer against the published code, and its switches against each other."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import log_softmax

from hdlm_jax.errors import UserError
from hdlm_jax.models import block, transformer
from hdlm_jax.models import cache as kv_cache
from hdlm_jax.models.attention import KV, cached, dense
from hdlm_jax.models.transformer import (
    Transformer,
    TransformerConfig,
    forward,
    forward_to_few,
    init,
    logits,
    rows_at,
    unstacked,
)

REFERENCE = Path(__file__).parents[1] / "reference"
PUBLISHED = TransformerConfig(num_tokens=96, length=32, hidden=64, blocks=2, heads=4)
GAMMA = replace(PUBLISHED, conditioning=32, interpolation=0.1)
SMALL = TransformerConfig(num_tokens=5, length=6, hidden=8, blocks=2, heads=2, conditioning=4, interpolation=0.1)
B, R = 2, 6


def published_params(config, tensors):
    """The published tensors, by their names, as our parameters; matrices there are [out, in]."""
    fill = config.padded_vocabulary - config.vocabulary
    rows = lambda name: np.pad(tensors[name], [(0, fill)] + [(0, 0)] * (tensors[name].ndim - 1))
    stack = lambda name: np.stack([tensors[f"blocks.{i}.{name}"] for i in range(config.blocks)])

    def dense(name, bias=True):
        return {"kernel": stack(f"{name}.weight").swapaxes(1, 2)} | ({"bias": stack(f"{name}.bias")} if bias else {})

    blocks = {
        "norm_attention": {"scale": stack("norm1.weight")},
        "norm_mlp": {"scale": stack("norm2.weight")},
        "qkv": dense("attn_qkv", False),
        "out": dense("attn_out", False),
        "mlp_in": dense("mlp.0"),
        "mlp_out": dense("mlp.2"),
    }
    params = {
        "embedding": rows("vocab_embed.embedding"),
        "norm": {"scale": tensors["output_layer.norm_final.weight"]},
        "head_kernel": rows("output_layer.linear.weight").T,
        "head_bias": rows("output_layer.linear.bias"),
        "blocks": blocks,
    }
    if config.conditioning:
        blocks["modulation"] = dense("adaLN_modulation")
        for ours, theirs in (("sigma_in", "sigma_map.mlp.0"), ("sigma_out", "sigma_map.mlp.2")):
            params[ours] = {"kernel": tensors[f"{theirs}.weight"].T, "bias": tensors[f"{theirs}.bias"]}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes_of(config))
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def epsilon_tiny():
    tensors = load_file(REFERENCE / "epsilon_tiny" / "model.safetensors")
    return published_params(PUBLISHED, tensors), np.load(REFERENCE / "epsilon_tiny" / "io.npz")


@pytest.fixture(scope="module")
def gamma_tiny():
    folder = REFERENCE / "gamma_tiny"
    tensors = dict(np.load(folder / "rest.npz"))
    for i in range(2):
        tensors |= {f"blocks.{i}.{name}": x for name, x in np.load(folder / f"block_{i}.npz").items()}
    return published_params(GAMMA, tensors), np.load(folder / "io.npz")


@pytest.fixture(scope="module")
def run():
    """(config, params, tokens, positions, visible, sigma) -> scores, jitted."""

    def scores(config, params, tokens, positions, visible, sigma=None):
        hidden, _ = forward(config, params, tokens, positions, dense(visible), sigma_BxR=sigma)
        return logits(config, params, hidden)

    return jax.jit(scores, static_argnums=0)


@pytest.fixture(scope="module")
def small():
    """Random parameters of SMALL (a fresh head and modulation are zero) and one batch."""
    params = random_params(SMALL, 0)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, SMALL.vocabulary, (B, R)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(R)[None], (B, R))
    return params, tokens, positions, jnp.asarray(rng.uniform(0.1, 3, (B, R)), jnp.float32)


def shapes_of(config):
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def random_params(config, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.4, dtype), shapes_of(config))


def causal(rows):
    return jnp.tril(jnp.ones((1, rows, rows), bool))


CASES = {
    "nomask": (None, "positions"),
    "m1_block8_step13_causal_full": ("m1_block8_step13_causal_full", "positions"),
    "m2_block8_step20_blockcausal_full": ("m2_block8_step20_blockcausal_full", "positions"),
    "m3_simple8_step17_full_causal": ("m3_simple8_step17_full_causal", "positions"),
    "m4_ar_block8_step11_causal_causal": ("m4_ar_block8_step11_causal_causal", "positions"),
    "nomask_positions_offset5": (None, "positions_offset"),
    "m5_eff2L_blockcausal_full_positions_double": ("m5_eff2L_blockcausal_full", "positions_double"),
}


def published_inputs(io, mask, positions):
    visible = jnp.ones((1, 32, 32), bool) if mask is None else jnp.asarray(~io[f"mask/{mask}"])[None]
    return io["tokens"].astype(np.int32), io[positions].astype(np.int32), visible


@pytest.mark.parametrize("case", CASES)
def test_scores_of_the_published_epsilon_network(epsilon_tiny, run, case):
    params, io = epsilon_tiny
    inputs = published_inputs(io, *CASES[case])
    ours = np.asarray(run(PUBLISHED, params, *inputs))
    sees = np.asarray(inputs[2][0]).any(-1)
    assert sees.sum() >= 12
    np.testing.assert_allclose(ours[:, sees, :96], io[f"logits/{case}"][:, sees, :96], atol=2e-5)
    assert ours.dtype == np.float32 and (ours[..., 96] == -np.inf).all()


def test_the_published_loss(epsilon_tiny, run):
    """Their loss counts the mask as a token, and rows that see nothing: both are filled in from their scores."""
    params, io = epsilon_tiny
    case = "m1_block8_step13_causal_full"
    inputs = published_inputs(io, *CASES[case])
    ours, theirs = np.asarray(run(PUBLISHED, params, *inputs)), io[f"logits/{case}"]
    ordinary = np.asarray(inputs[2][0]).any(-1)[None, :, None] & (np.arange(97) < 96)
    filled = np.where(ordinary, ours, theirs)
    nats = -np.take_along_axis(log_softmax(filled, -1), io["clean"][..., None], -1).mean()
    np.testing.assert_allclose(nats, io["grad_loss_m1"], rtol=1e-6)


def test_scores_of_the_published_gamma_network(gamma_tiny, run):
    """Conditioned on a noise level per position, the input embedding drawn to the mask's."""
    params, io = gamma_tiny
    sigma = jnp.asarray(io["sigma_rand"])
    embedded = Transformer(GAMMA).apply({"params": params}, io["tokens"].astype(np.int32), sigma, method="embed")
    np.testing.assert_allclose(embedded, io["embed_rand"], atol=1e-6)
    condition = Transformer(GAMMA).apply({"params": params}, sigma, method="condition")
    np.testing.assert_allclose(jax.nn.silu(condition), io["cond_rand"], atol=2e-6)
    to_score = np.log(np.expm1(io["sigma_rand"])) + np.log(96)
    for case in ("nomask", "m1_block8_step13_causal_full"):
        inputs = published_inputs(io, *CASES[case])
        ours = np.asarray(run(GAMMA, params, *inputs, sigma))[..., :96] - to_score[..., None]
        sees = np.asarray(inputs[2][0]).any(-1)
        np.testing.assert_allclose(ours[:, sees], io[f"logits/sigma_rand/{case}"][:, sees, :96], atol=4e-5)


def small_loss(config, params, inputs):
    """-log p of token 1, mean over rows; and the hidden rows and scores."""
    tokens, positions, sigma = inputs
    hidden, _ = forward(config, params, tokens, positions, dense(causal(R)), sigma_BxR=sigma)
    scores = logits(config, params, hidden)
    return -jax.nn.log_softmax(scores)[..., 1].mean(), (hidden, scores)


value_and_gradient = jax.jit(jax.value_and_grad(small_loss, argnums=1, has_aux=True), static_argnums=0)


@pytest.fixture(scope="module")
def scanned(small):
    """Loss, (hidden rows, scores) and gradient of the small network, in float64."""
    with jax.enable_x64(True):
        params, *inputs = jax.tree.map(wide, small)
        (value, aux), gradient = value_and_gradient(SMALL, params, inputs)
        return jax.tree.map(np.asarray, (value, aux, gradient))


def wide(x):
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)


def test_the_gradient_is_the_slope_of_the_loss(small, scanned):
    """Of every parameter at once, along one random direction in float64, through scan and recomputation."""
    step, gradient = 1e-5, scanned[2]
    with jax.enable_x64(True):
        params, *inputs = jax.tree.map(wide, small)
        direction = random_params(SMALL, 3, np.float64)
        moved = [jax.tree.map(lambda x, d, h=h: x + h * d, params, direction) for h in (step, -step)]
        ends = [float(value_and_gradient(SMALL, params, inputs)[0][0]) for params in moved]
    along = jax.tree.map(lambda g, d: (g * np.asarray(d)).sum(), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(along)), (ends[0] - ends[1]) / (2 * step), rtol=1e-7)
    assert scanned[1][1].dtype == np.float64
    assert not gradient["head_kernel"][:, SMALL.num_tokens :].any()  # the mask and the padding are never predicted
    assert not gradient["embedding"][SMALL.vocabulary :].any()
    assert gradient["embedding"][SMALL.num_tokens].any()


@pytest.mark.slow
def test_remat_stores_less_and_changes_nothing(small, scanned):
    with jax.enable_x64(True):
        params, *inputs = jax.tree.map(wide, small)
        (value, aux), gradient = value_and_gradient(replace(SMALL, remat="none"), params, inputs)
    for ours, theirs in zip(jax.tree.leaves((value, aux, gradient)), jax.tree.leaves(scanned), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-13)


def test_sixteen_bit_activations_keep_float32_scores(run, small, scanned):
    params, tokens, positions, sigma = small
    scores = run(replace(SMALL, dtype="bfloat16"), params, tokens, positions, causal(R), sigma)
    assert scores.dtype == jnp.float32
    theirs = scanned[1][1]
    np.testing.assert_allclose(scores[..., :5], theirs[..., :5], atol=0.15)
    assert (np.abs(scores - theirs)[..., :5] > 1e-4).mean() > 0.9


def test_the_padded_vocabulary_changes_nothing(run, small, scanned):
    params, tokens, positions, sigma = small
    exact = replace(SMALL, vocabulary_multiple=1)
    assert (exact.padded_vocabulary, SMALL.padded_vocabulary) == (6, 128)
    cut = {**params, "embedding": params["embedding"][:6]}
    cut |= {"head_kernel": params["head_kernel"][:, :6], "head_bias": params["head_bias"][:6]}
    hidden, theirs = scanned[1]
    np.testing.assert_allclose(run(exact, cut, tokens, positions, causal(R), sigma), theirs, atol=1e-5)
    padded = logits(SMALL, params, jnp.asarray(hidden, jnp.float32), padded=True)
    assert padded.shape == (B, R, 128) and theirs.shape == (B, R, 6)
    np.testing.assert_allclose(padded[..., :6], theirs, atol=1e-5)
    assert (padded[..., 5:] == -jnp.inf).all()


@pytest.mark.parametrize("layout", [lambda config, params: params, unstacked], ids=["stacked", "unstacked"])
def test_rows_fed_in_two_calls_are_the_rows_fed_in_one(small, scanned, layout):
    """With keys and values in between; blocks by one scan, and one by one."""
    params, tokens, positions, sigma = small
    params = layout(SMALL, params)
    cut = lambda a, b: (tokens[:, a:b], positions[:, a:b])

    @jax.jit
    def two_calls(params):
        first, past = forward(SMALL, params, *cut(0, 4), dense(causal(4)), sigma_BxR=sigma[:, :4], return_kv=True)
        attention = cached(jnp.ones((1, 2, 4), bool), causal(2))
        is_kv = lambda x: isinstance(x, KV)
        turned = jax.tree.map(lambda kv: KV(jnp.swapaxes(kv.k, -1, -2), kv.v), past, is_leaf=is_kv)  # as in a cache
        second, new = forward(SMALL, params, *cut(4, R), attention, sigma_BxR=sigma[:, 4:], past=turned, return_kv=True)
        return jnp.concatenate([first, second], 1), past, new

    hidden, past, new = two_calls(params)
    np.testing.assert_allclose(hidden, scanned[1][0], atol=1e-5)
    assert jax.tree.structure(past) == jax.tree.structure(new)
    per_block = (B, SMALL.heads, 4, SMALL.head_size)
    lead = () if isinstance(params["blocks"], tuple) else (SMALL.blocks,)
    assert {x.shape for x in jax.tree.leaves(past)} == {(*lead, *per_block)}


@pytest.mark.parametrize("place", [None, [[2, 0], [1, 1]]], ids=["all", "few"])
def test_a_few_rows_that_leave_are_those_of_all_that_are_fed(small, scanned, place):
    """Beside earlier rows, conditioned; the keys and values are those of every row fed."""
    params, tokens, positions, sigma = small
    place_BxK = None if place is None else jnp.asarray(place)
    cut = lambda a, b: (tokens[:, a:b], positions[:, a:b])
    visible, leaving = jnp.broadcast_to(causal(R - 1), (B, R - 1, R - 1)), slice(2, R - 1)
    few_see = lambda place_BxK: cached(None, rows_at(visible[:, leaving], place_BxK))

    @jax.jit
    def all_and_few(params):
        params = unstacked(SMALL, params)
        _, kv = forward(SMALL, params, *cut(0, 1), dense(), sigma_BxR=sigma[:, :1], return_kv=True)
        past = kv_cache.write(kv_cache.empty(SMALL, B, 1, jnp.float32), kv, jnp.zeros((B, 1), jnp.int32))
        given = {"sigma_BxR": sigma[:, 1:], "past": past}
        _, every = forward(SMALL, params, *cut(1, R), cached(None, visible), **given, return_kv=True)
        rows, new = forward_to_few(SMALL, params, *cut(1, R), cached(None, visible), leaving, few_see, **given)
        return every, new, rows(place_BxK)

    every, new, hidden = all_and_few(params)
    expected = rows_at(jnp.asarray(scanned[1][0][:, 3:]), place_BxK)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), new, every)


def test_dropout_needs_a_key_and_differs_by_key(small, scanned):
    params, tokens, positions, sigma = small

    def hidden(rate, rng):
        config = replace(SMALL, dropout=rate)
        return forward(config, params, tokens, positions, dense(causal(R)), sigma_BxR=sigma, dropout_rng=rng)[0]

    assert "random_bits" in str(jax.make_jaxpr(lambda rng: hidden(0.5, rng))(jax.random.key(0)))
    for rate, rng in ((0.5, None), (0.0, jax.random.key(0))):
        assert "random_" not in str(jax.make_jaxpr(lambda rate=rate, rng=rng: hidden(rate, rng))())
    draw = jax.jit(lambda rng: hidden(0.5, rng))
    first, again, other = draw(jax.random.key(1)), draw(jax.random.key(1)), draw(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    for a, b in [(first, other), (first, scanned[1][0])]:
        assert (np.abs(a - b).max(-1) > 1e-3).mean() > 0.9


def test_every_place_of_dropout_draws_its_own_mask(small):
    """With all of a block's branches the same, no two places drop the same elements."""
    real = block.drop
    params, tokens, positions, sigma = small
    attention = lambda q, k, v, past, dropout: dropout(q, 0) + dropout(q, 1)

    def keys_used(rng):
        seen = []

        def spy(rng, x, rate):
            seen.append(jax.random.key_data(rng))
            return real(rng, x, rate)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block, "drop", spy)
            stack = unstacked(SMALL, params)
            forward(SMALL, stack, tokens, positions, attention, sigma_BxR=sigma, dropout_rng=rng)
        return seen

    seen = jax.jit(keys_used)(jax.random.key(0))
    assert len(seen) == len({tuple(np.asarray(key)) for key in seen}) == 4 * SMALL.blocks


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(rate):
    x, count = jnp.asarray([[1.0, -3.0, 0.5]]), 40_000
    dropped = np.asarray(block.drop(jax.random.key(0), jnp.broadcast_to(x, (count, 3)), rate), np.float64)
    share = (dropped == 0).mean(0)
    assert (np.abs(share - rate) < 4 * (rate * (1 - rate) / count) ** 0.5).all()
    assert (np.abs(dropped.mean(0) - np.asarray(x)) < 4 * dropped.std(0) / count**0.5).all()
    assert len(np.unique(dropped[:, 0])) == 2


def test_rates_next_to_0_and_1_still_drop_and_keep():
    ones = jnp.ones(1000)
    assert bool(jnp.isfinite(block.drop(jax.random.key(0), ones, 1e-9)).all())
    assert bool(jnp.isfinite(block.drop(jax.random.key(0), ones, 1 - 1e-9)).all())


@pytest.mark.slow
def test_a_fresh_network_predicts_every_token_alike():
    config = replace(SMALL, conditioning=0)
    params = jax.jit(lambda rng: init(config, rng))(jax.random.key(0))
    hidden = jnp.ones((1, 1, SMALL.hidden))
    np.testing.assert_array_equal(logits(SMALL, params, hidden)[0, 0], [0, 0, 0, 0, 0, -np.inf])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    D, F, V, blocks = 8, 32, 128, 2
    per_block = 2 * D + 4 * D * D + 2 * D * F + F + D
    assert transformer.num_parameters(params) == blocks * per_block + 2 * V * D + V + D


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 0}, r"model.hidden: got 0; allowed: a positive integer"),
        ({"heads": 3}, r"model.heads: got 3; allowed: a divisor of model.hidden = 8"),
        ({"heads": 8}, r"model.heads: got 8; allowed: an even head size"),
        ({"dropout": 1.0}, r"model.dropout: got 1.0; allowed: a number in \[0, 1\)"),
        ({"conditioning": -1}, r"model.conditioning: got -1"),
        ({"prediction": "shiftd"}, r"model.prediction: got 'shiftd'; allowed: 'aligned', 'shifted'"),
        ({"prediction": "shifted"}, r"model.bos_id: got None; allowed: a token id"),
        ({"visibility": "causal"}, r"model.visibility: got 'causal'; allowed: 'full', 'prefix'"),
        ({"context_group": 0}, r"model.context_group: got 0; allowed: a positive integer"),
        ({"remat": "some"}, r"model.remat: got 'some'; allowed: 'none', 'dots', 'full'"),
        ({"dtype": "float16"}, r"model.dtype: got 'float16'"),
    ],
)
def test_sizes_and_switches_out_of_range_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        TransformerConfig(**{"num_tokens": 5, "length": 4, "hidden": 8, "blocks": 1, "heads": 2} | fields)
