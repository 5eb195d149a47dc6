"""Published checkpoints through import: the authors' outputs, the way back bit for bit, and what a run can do."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy.special import log_softmax

import hdlm_jax as hdlm
from hdlm_jax.__main__ import main
from hdlm_jax.data import tokenizers
from hdlm_jax.errors import UserError
from hdlm_jax.interop import published, published_tensors

MASKS = {
    "m1": "m1_block8_step13_causal_full",
    "m2": "m2_block8_step20_blockcausal_full",
    "m3": "m3_simple8_step17_full_causal",
    "m4": "m4_ar_block8_step11_causal_causal",
}


@pytest.fixture(scope="module")
def models(imported):
    return {family: hdlm.load(folder) for family, folder in imported.items()}


def visible(io, mask):
    """Who sees whom under a mask of theirs, and the rows that see something."""
    if mask is None:
        return None, np.ones(32, bool)
    sees = ~(io[f"mask/{mask}"] if f"mask/{mask}" in io else io[f"more/mask/{mask}"])
    return jnp.asarray(sees), sees.any(-1)


# ---- the authors' outputs


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_an_imported_epsilon_model_gives_the_authors_logits(models, goldens, mask):
    """All V columns: the mask's too."""
    model, io = models["epsilon"], goldens["epsilon"]
    sees, rows = visible(io, MASKS.get(mask))
    ours = published.outputs(model.parts.model, model.params, io["tokens"].astype(np.int32), None, sees)
    assert ours.shape == (3, 32, 97) and rows.sum() >= 12
    theirs = io[f"logits/{MASKS.get(mask, 'nomask')}"]
    np.testing.assert_allclose(ours[:, rows], theirs[:, rows], atol=2e-5)


@pytest.mark.parametrize("case", ["nomask_positions_offset5", "m5_eff2L_blockcausal_full_positions_double"])
def test_positions_are_the_callers(models, goldens, case):
    model, io = models["epsilon"], goldens["epsilon"]
    double = case.startswith("m5")
    sees, rows = visible(io, "m5_eff2L_blockcausal_full" if double else None)
    positions = jnp.asarray(io["positions_double" if double else "positions_offset"], jnp.int32)
    ours = published.outputs(model.parts.model, model.params, io["tokens"].astype(np.int32), None, sees, positions)
    np.testing.assert_allclose(ours[:, rows], io[f"logits/{case}"][:, rows], atol=2e-5)


@pytest.mark.parametrize("mask", [None, *MASKS])
def test_an_imported_gamma_model_gives_the_authors_log_scores(models, goldens, mask):
    model, io = models["gamma"], goldens["gamma"]
    sees, rows = visible(io, MASKS.get(mask))
    tokens, sigma = jnp.asarray(io["tokens"], jnp.int32), jnp.asarray(io["sigma_rand"])
    ours = published.outputs(model.parts.model, model.params, tokens, sigma, sees)
    name = f"logits/sigma_rand/{MASKS.get(mask, 'nomask')}"
    theirs = io[name] if name in io else io[f"more/{name}"]
    np.testing.assert_allclose(ours[: len(theirs), rows], theirs[:, rows], atol=2e-5)


def test_log_scores_at_the_levels_of_a_block(models, goldens):
    model, io, mask = models["gamma"], goldens["gamma"], MASKS["m2"]
    sees, rows = visible(io, mask)
    tokens, sigma = jnp.asarray(io["tokens"][:1], jnp.int32), jnp.asarray(io["more/sigma_block"])
    ours = published.outputs(model.parts.model, model.params, tokens, sigma, sees)
    np.testing.assert_allclose(ours[:, rows], io[f"more/logits/sigma_block/{mask}"][:, rows], atol=2e-5)


def test_a_shifted_gamma_model_gives_its_next_token_a_log_score_of_0(models, goldens):
    from dataclasses import replace

    model, io = models["gamma"], goldens["gamma"]
    shifted = replace(model.parts.model, prediction="shifted", bos_id=95)
    tokens, sigma = jnp.asarray(io["tokens"][:1], jnp.int32), jnp.asarray(io["sigma_rand"][:1])
    ours = published.outputs(shifted, model.params, tokens, sigma)
    np.testing.assert_allclose(ours, io["more/logits_AR/sigma_rand/nomask"], atol=2e-5)
    assert (ours == 0).sum() == 31


@pytest.mark.parametrize("family", ["epsilon", "gamma"])
def test_logits_of_the_loaded_model_are_the_authors(models, goldens, family):
    io = goldens[family]
    ours = models[family].logits(io["tokens"].astype(np.int32), None if family == "epsilon" else io["sigma_rand"])
    theirs = io["logits/nomask" if family == "epsilon" else "logits/sigma_rand/nomask"]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert ours.dtype == jnp.float32


@pytest.mark.parametrize("family", ["epsilon", "gamma"])
def test_the_loss_and_its_slope(models, goldens, family):
    """`grad_loss_m1` is their mean cross-entropy; rows that see nothing count there, and are filled in from theirs.

    The gradient by the weights agrees with the slope of the loss along a direction.
    """
    model, io, mask = models[family], goldens[family], MASKS["m1"]
    sees, rows = visible(io, mask)
    sigma = None if family == "epsilon" else jnp.asarray(io["sigma_rand"])
    theirs = io[f"logits/{'' if family == 'epsilon' else 'sigma_rand/'}{mask}"]
    tokens, clean = jnp.asarray(io["tokens"], jnp.int32), jnp.asarray(io["clean"])

    def loss(params):
        ours = published.outputs(model.parts.model, params, tokens, sigma, sees)
        log_p = jax.nn.log_softmax(jnp.where(rows[None, :, None], ours, theirs))
        return -jnp.take_along_axis(log_p, clean[..., None], -1).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(model.params)
    np.testing.assert_allclose(value, io["grad_loss_m1"], rtol=1e-6)
    nats = -np.take_along_axis(log_softmax(theirs, -1), io["clean"][..., None], -1).mean()
    np.testing.assert_allclose(value, nats, rtol=1e-6)
    head = np.array(gradient["head_bias"])  # by hand: mean over rows of p - 1[clean], where ours are not filled in
    p = np.exp(log_softmax(theirs, -1)) - np.eye(97)[io["clean"]]
    np.testing.assert_allclose(head[:97], p[:, rows].sum((0, 1)) / clean.size, atol=1e-6)
    assert head[96] != 0 and not head[97:].any()


# ---- there and back


@pytest.mark.parametrize("family", ["epsilon", "gamma"])
def test_the_way_back_is_equal_in_every_bit(folders, imported, family, tmp_path):
    assert main(["export", str(imported[family]), str(tmp_path / "out"), "--format", "published"]) == 0
    names = lambda folder: {path.name: path.read_bytes() for path in folder.iterdir()}
    assert names(tmp_path / "out") == names(folders[family])


def test_sixteen_bit_tensors_come_back_as_such(folders, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(folders["epsilon"] / "model.safetensors")
    bits = {"norm": jnp.bfloat16, "mlp": np.float16}
    for name, x in tensors.items():
        tensors[name] = x.astype(next((dtype for part, dtype in bits.items() if part in name), np.float32))
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_bytes((folders["epsilon"] / "config.json").read_bytes())
    published.import_folder(source, tmp_path / "run")
    hdlm.load(tmp_path / "run").export(tmp_path / "out", "published")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (x.dtype, x.tobytes()) for name, x in again.items()} == {
        name: (x.dtype, x.tobytes()) for name, x in tensors.items()
    }


def test_the_masks_column_and_the_padding(models, folders):
    model, tensors = models["epsilon"], load_file(folders["epsilon"] / "model.safetensors")
    assert model.params["head_kernel"].shape == (64, 128)
    np.testing.assert_array_equal(model.params["head_kernel"][:, 96], tensors["output_layer.linear.weight"][96])
    np.testing.assert_array_equal(model.params["embedding"][96], tensors["vocab_embed.embedding"][96])
    for name, axis in (("embedding", 0), ("head_kernel", 1), ("head_bias", 0)):
        assert not np.moveaxis(np.asarray(model.params[name]), axis, 0)[97:].any()


def test_the_rotary_buffer_of_ours_is_theirs(models, folders):
    theirs = load_file(folders["epsilon"] / "model.safetensors")["rotary_emb.inv_freq"]
    ours = published_tensors.frequencies(models["epsilon"].parts.model)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# ---- what an imported run can do


@pytest.mark.parametrize("family", ["epsilon", "gamma"])
def test_an_imported_run_is_sampled_and_has_no_text_without_a_tokenizer(imported, family, capfd):
    model = hdlm.load(imported[family])
    out = model.generate(num_samples=2, seed=3)
    assert out.tokens.shape == (2, 32) and (out.tokens < 96).all()
    assert out.texts[0] == tokenizers.tokens_only(96).decode(out.tokens[0], end_of_text="\n")
    assert out.hyperschedule.kind == "block" and out.hyperschedule.width == 8
    for ask in (lambda: model.generate("a"), lambda: model.perplexity("some text")):
        with pytest.raises(UserError, match="a vocabulary of 96 tokens and no tokenizer"):
            ask()
    capfd.readouterr()
    assert main(["evaluate", "--run", str(imported[family])]) == 2
    assert "--text: got None; allowed: a file: an imported model has no held-out" in capfd.readouterr().err


def test_an_imported_run_with_a_tokenizer_reads_and_writes_text(worded, tmp_path, capfd):
    run = tmp_path / "run"
    assert main(["import", str(worded), "--workdir", str(run)]) == 0
    assert "shifted; epsilon_hybrid; flat: L=32" in capfd.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat. <|endoftext|> is text here.\n" * 4)
    assert main(["evaluate", "--run", str(run), "--text", str(text), "--draws", "2", "--json"]) == 0
    bound = json.loads(capfd.readouterr().out)
    assert bound["num_bytes"] == pytest.approx(len(text.read_text())) and 1 < bound["bits_per_byte"] < 40
    out = tmp_path / "samples.json"
    assert main(["sample", "--run", str(run), "--prompt", "the cat", "--num", "2", "--out", str(out)]) == 0
    assert all(sample.startswith("the cat") for sample in json.loads(out.read_text())["texts"])
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "published"]) == 0
    for path in worded.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_the_config_and_the_weights_are_all_that_is_needed(folders, tmp_path):
    """config.yaml with references and numbers as YAML leaves them, and no rotary buffer."""
    import yaml

    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((folders["epsilon"] / "config.json").read_text())
    config["annealing"]["eval_tau"] = "${annealing.tau}"
    config["training"]["epsilon"] = "1e-2"
    (source / "config.yaml").write_text(yaml.safe_dump(config))
    tensors = load_file(folders["epsilon"] / "model.safetensors")
    del tensors["rotary_emb.inv_freq"]
    save_file(tensors, source / "model.safetensors")
    found = published.import_folder(source, tmp_path / "run")
    assert found.parts.process.epsilon == 0.01 and found.parts.hs.tau_max == 8
    hdlm.load(tmp_path / "run").export(tmp_path / "out", "published")
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == set(tensors)
    assert (tmp_path / "out" / "config.yaml").read_bytes() == (source / "config.yaml").read_bytes()
