"""The denoiser and the sampler as programs: reloaded without this package they give what ours give."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hdlm_jax as hdlm
from hdlm_jax.__main__ import main
from hdlm_jax.generation import sampling
from hdlm_jax.interop import stablehlo
from hdlm_jax.models import layouts
from hdlm_jax.models.transformer import forward, logits
from tests.generation.chains import recomputed_scores
from tests.models import tiny

pytest.importorskip("flatbuffers", reason="jax.export files need the package flatbuffers")

# A process of its own, in which this package cannot be imported.
PROGRAM = """
import sys
sys.modules["hdlm_jax"] = None
import jax, numpy as np
from safetensors.numpy import load_file
folder = sys.argv[1]
params, inputs = load_file(f"{folder}/model.safetensors"), np.load(sys.argv[2])
out = {}
for call in sorted({name.split("/")[0] for name in inputs}):
    function = jax.export.deserialize(bytearray(open(f"{folder}/{call.split('-')[0]}.stablehlo", "rb").read()))
    arguments = [inputs[f"{call}/{i}"] for i in range(len(inputs)) if f"{call}/{i}" in inputs]
    out[call] = np.asarray(jax.jit(function.call)(params, *arguments))
np.savez(sys.argv[3], **out)
"""


@pytest.fixture(scope="module")
def exported(smoke_run, tmp_path_factory):
    """The smoke run (prefix, shifted, a slide of width 8 at rate 1, 32 positions) as programs."""
    folder = tmp_path_factory.mktemp("stablehlo") / "out"
    assert main(["export", str(smoke_run), str(folder), "--format", "stablehlo"]) == 0
    return folder


def in_a_fresh_process(folder, place, **calls):
    inputs = {f"{name}/{i}": np.asarray(x) for name, arguments in calls.items() for i, x in enumerate(arguments)}
    np.savez(place / "inputs.npz", **inputs)
    command = [sys.executable, "-c", PROGRAM, str(folder), str(place / "inputs.npz"), str(place / "outputs.npz")]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(place / "outputs.npz"))


@pytest.mark.slow
def test_a_fresh_process_without_the_package_gives_the_same(exported, tmp_path):
    model, prompts = hdlm.load(exported), ["the cat ", "", "a hen"]
    ids = [model.tokenizer.encode(text) for text in prompts]
    given = np.arange(32)[None] < np.array([len(x) for x in ids])[:, None]
    tokens = np.array([np.pad(x, (0, 32 - len(x)), constant_values=7) for x in ids], np.int32)
    noised = np.random.default_rng(0).integers(0, 258, (3, 32)).astype(np.int32)
    step, origin = 11, given.sum(1)
    start, stop = (bound + origin for bound in model.parts.hs.window(step))
    found = in_a_fresh_process(
        exported,
        tmp_path,
        sampler=[tokens, given, np.uint32(5)],
        denoiser=[noised, start.astype(np.int32), np.minimum(stop, 32).astype(np.int32)],
        **{"denoiser-short": [noised[:1, :9], np.int32([3]), np.int32([9])]},
    )
    np.testing.assert_array_equal(found["sampler"], model.generate(prompts, seed=5).tokens)
    np.testing.assert_array_equal(found["sampler"][given], tokens[given])
    chain = sampling.chain(model.parts, model.parts.hs, model.config.sampler)
    scores = jax.jit(recomputed_scores, static_argnums=0)
    phase, ours = scores(chain, model.params, jnp.asarray(noised), jnp.asarray(given), jnp.array(step))
    active = np.asarray(phase.alpha_s > phase.alpha_t)
    assert active.sum() > 16
    np.testing.assert_allclose(found["denoiser"][active], np.asarray(ours)[active], atol=1e-5)
    assert np.isneginf(found["denoiser"][..., -1]).all()
    assert found["denoiser-short"].shape == (1, 9, 258)


def test_the_description_lists_the_arguments_as_they_are(exported):
    about = json.loads((exported / "functions.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"] and about["mask_id"] == 257
    assert about["hyperschedule"].startswith("slide: L=32, width 8, rate 1")
    for name, function in about["functions"].items():
        program = jax.export.deserialize(bytearray((exported / f"{name}.stablehlo").read_bytes()))
        assert tuple(about["platforms"]) == program.platforms
        shown = [([str(size) for size in x["shape"]], x["dtype"]) for x in function["arguments"]]
        assert shown == [([str(size) for size in x.shape], str(x.dtype)) for x in program.in_avals]
        (out,) = function["results"]
        assert [str(size) for size in out["shape"]] == [str(size) for size in program.out_avals[0].shape]
        names = [x["name"] for x in function["arguments"]]
        assert names[0] == "params['blocks.mlp_in.bias']" and len(names) == len(program.in_avals)
    assert [x["name"] for x in about["functions"]["denoiser"]["arguments"]][-3:] == ["tokens", "start", "stop"]
    assert [x["name"] for x in about["functions"]["sampler"]["arguments"]][-3:] == ["tokens", "given", "seed"]


def test_the_folder_is_one_of_ours_and_its_programs_are_small(exported):
    assert {"config.json", "model.safetensors", "tokenizer.json"} < {path.name for path in exported.iterdir()}
    assert max(path.stat().st_size for path in exported.glob("*.stablehlo")) < 300_000


@pytest.mark.parametrize("prediction", ["aligned", "shifted"])
def test_a_conditioned_network_takes_noise_levels_clipped_as_in_training(prediction):
    fields = {"noising__kind": "gamma_hybrid", "noising__gamma": 0.1, "loss__kind": "score_entropy"}
    fields |= {"noise_schedule__eps": 1e-3, "model__conditioning": 8, "model__vocabulary_multiple": 4}
    made = tiny.build(5, 6, model__prediction=prediction, sampler__kind="ancestral", **fields)
    sampler = hdlm_sampler(kind="ancestral")
    params = tiny.random_params(made.model)
    tokens = np.random.default_rng(0).integers(0, 6, (2, 6)).astype(np.int32)
    sigma = np.random.default_rng(1).uniform(0, 20, (2, 6)).astype(np.float32)
    sigma[0, :2] = 0
    function = stablehlo.functions(made, sampler)["denoiser"]
    flat, weights = stablehlo.flat_weights(params, made.model.vocabulary)
    program = stablehlo.exported(function, weights, 6)
    found = program.call(flat, tokens, sigma)
    low, high = hdlm.noise_schedules.sigma_range(made.schedule)
    rows = layouts.whole_window(made.model, jnp.asarray(tokens))
    levels = layouts.held(made.model, jnp.clip(sigma, low, high), rows.tokens.shape[1], low)
    hidden, _ = forward(made.model, params, rows.tokens, rows.positions, rows.attention, sigma_BxR=levels)
    np.testing.assert_allclose(found, logits(made.model, params, hidden[:, :6]), atol=1e-5)
    with pytest.raises(ValueError, match="l <= 6"):
        program.call(flat, np.zeros((1, 7), np.int32), np.zeros((1, 7), np.float32))


def hdlm_sampler(**changes):
    from hdlm_jax import config

    return config.override(config.default(), {f"sampler.{name}": value for name, value in changes.items()}).sampler


def test_what_is_missing_or_does_not_fit_leaves_nothing(smoke_run, tmp_path, monkeypatch, capfd):
    command = ["export", str(smoke_run), str(tmp_path / "out"), "--format", "stablehlo"]
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    assert main(command) == 2
    assert "'stablehlo' needs a package: pip install flatbuffers" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
