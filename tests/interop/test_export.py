"""Our own layout, and runs that start from the weights of another."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import hdlm_jax as hdlm
from hdlm_jax.__main__ import main
from hdlm_jax.data import prepare
from hdlm_jax.errors import UserError
from hdlm_jax.models.transformer import init
from hdlm_jax.training import optimizer, sharding, state, storage, train, weights_file


@pytest.fixture(scope="module")
def exported(smoke_run, tmp_path_factory):
    """weights -> the smoke run exported."""
    place = tmp_path_factory.mktemp("exported")
    for weights in ("ema", "raw"):
        assert main(["export", str(smoke_run), str(place / weights), "--weights", weights]) == 0
    return {weights: place / weights for weights in ("ema", "raw")}


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_an_exported_folder_opens_as_the_run(smoke_run, exported, weights):
    ours, again = hdlm.load(smoke_run, weights), hdlm.load(exported[weights], weights)
    tokens = np.random.default_rng(0).integers(0, ours.parts.model.vocabulary, (2, 32))
    np.testing.assert_array_equal(ours.logits(tokens), again.logits(tokens))
    assert (again.step, again.weights, again.origin) == (6, weights, None)
    assert again.config == ours.config and again.parts.model == ours.parts.model
    assert again.tokenizer.fingerprint == ours.tokenizer.fingerprint
    if weights == "raw":
        assert hdlm.load(exported["raw"]).weights == "raw"  # all that there is
        assert (hdlm.load(exported["ema"]).logits(tokens) != again.logits(tokens)).any()


def test_the_file_holds_v_rows_and_says_what_it_is(exported):
    with safe_open(exported["ema"] / "model.safetensors", "numpy") as file:
        about, names = file.metadata(), list(file.keys())
        assert file.get_slice("embedding").get_shape() == [258, 16]
        assert file.get_slice("blocks.qkv.kernel").get_shape() == [1, 16, 48]
    assert {"format": "hdlm_jax", "weights": "ema", "step": "6"}.items() <= about.items()
    assert len(names) == 12
    assert sorted(path.name for path in exported["ema"].iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_an_imported_run_keeps_its_origin(imported, goldens, tmp_path):
    hdlm.load(imported["epsilon"]).export(tmp_path / "out")
    again, io = hdlm.load(tmp_path / "out"), goldens["epsilon"]
    np.testing.assert_allclose(again.logits(io["tokens"].astype(np.int32)), io["logits/nomask"], atol=2e-5)
    again.export(tmp_path / "back", "published")
    theirs = again.origin.files["config.json"]
    assert (tmp_path / "back" / "config.json").read_bytes() == theirs


def test_our_own_run_as_a_published_checkpoint(worded, imported, tmp_path):
    """A run without the authors' files gets a config and tensors that import reads back to the same weights."""
    from hdlm_jax.interop import published

    for source, family in ((worded, "worded"), (imported["gamma"], "gamma")):
        if family == "worded":
            assert main(["import", str(source), "--workdir", str(tmp_path / family)]) == 0
        else:
            shutil.copytree(source, tmp_path / family)
        shutil.rmtree(tmp_path / family / "published")
        model = hdlm.load(tmp_path / family)
        assert model.origin is None
        model.export(tmp_path / f"{family}-out", "published")
        again = published.read(tmp_path / f"{family}-out")
        jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
        assert again.parts.model == model.parts.model
        assert again.tokenizer.fingerprint == model.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), "not a whole safetensors file"),
        (lambda path: path.unlink(), "checkpoints: got"),
        (lambda path: flip(path), "allowed: a file whose content matches its digest"),
        (lambda path: without(path, "blocks.qkv.kernel"), "missing in it: blocks/qkv/kernel"),
        (lambda path: save_file(load_file(path), path), "one written by `hdlm export --format safetensors`"),
    ],
    ids=["truncated", "gone", "flipped bit", "a tensor less", "of others"],
)
def test_a_spoilt_export_is_refused(exported, tmp_path, spoil, says):
    folder = shutil.copytree(exported["ema"], tmp_path / "copy")
    spoil(folder / "model.safetensors")
    with pytest.raises(UserError, match=says):
        hdlm.load(folder)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without(path, name):
    with safe_open(path, "numpy") as file:
        about, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys() if key != name}  # noqa: SIM118
    save_file(tensors, path, about)


def test_what_is_not_there_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="weights: got .raw.; allowed: .ema., which is all that"):
        hdlm.load(exported["ema"], "raw")
    with pytest.raises(UserError, match="--format: got 'safetensor' .did you mean 'safetensors'"):
        hdlm.load(exported["ema"]).export(tmp_path / "x", "safetensor")
    with pytest.raises(UserError, match="OUT: got .*; allowed: a new or empty folder"):
        hdlm.load(exported["ema"]).export(exported["raw"])
    assert not (tmp_path / "x").exists()


def test_a_run_the_authors_code_does_not_have_leaves_nothing(smoke_run, tmp_path, capfd):
    assert main(["export", str(smoke_run), str(tmp_path / "x"), "--format", "published"]) == 2
    assert "hdlm: noise_schedule: got" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- runs that start from other weights


@pytest.fixture
def started(smoke_run, tmp_path):
    """(arguments) -> status of a run of one step on the data of the smoke run."""

    def run(*more):
        more = [*map(str, more), "--config.training.steps=1", "--config.training.evaluate_every=0"]
        data = f"--config.data.prepared={smoke_run}/data"
        return main(["train", "--workdir", str(tmp_path / "new"), data, *more])

    return run


def test_the_first_state_has_the_other_runs_weights_laid_out_as_asked(smoke_run, exported):
    """Weights and running mean apart in memory: both are donated."""
    model, data = hdlm.load(smoke_run), prepare.open_prepared(smoke_run / "data")
    tx, mesh = optimizer.build(model.config.optimizer, 1), sharding.mesh(model.config.mesh)
    fresh = state.create(lambda: init(model.parts.model, jax.random.key(1)), tx, mesh)
    for folder in (smoke_run, exported["ema"]):
        current = train._begin(fresh, train._initial(str(folder), model.parts, data))
        cut = lambda tree: weights_file.unpadded(tree, 258)
        for tree in (current.params, current.ema):
            jax.tree.map(np.testing.assert_array_equal, cut(tree), cut(model.params))
        assert jax.tree.map(lambda x: x.sharding, current) == jax.tree.map(lambda x: x.sharding, fresh)
        places = [leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(current)]
        assert len(places) == len(set(places))
    assert train._begin(fresh, train._initial("", model.parts, data)) is fresh


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another(smoke_run, exported, started, tmp_path, capfd):
    """With a learning rate near 0 the first step leaves the weights as they were: the running mean of the other run."""
    slow = "--config.optimizer.learning_rate=1e-30"
    assert started("--init", exported["ema"], slow) == 0
    assert f"started from {exported['ema']}" in capfd.readouterr().out
    given = hdlm.load(smoke_run).params
    for weights in ("ema", "raw"):
        found = hdlm.load(tmp_path / "new", weights)
        jax.tree.map(np.testing.assert_array_equal, found.params["blocks"], given["blocks"])
        np.testing.assert_array_equal(found.params["embedding"][:258], given["embedding"][:258])
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["training"]["initial"] == str(exported["ema"]) == config["data"]["tokenizer"]
    before = storage.read_manifest(tmp_path / "new" / "checkpoints", 1)
    assert started("--init", exported["ema"], slow) == 0
    assert "nothing left to do" in capfd.readouterr().out
    assert storage.read_manifest(tmp_path / "new" / "checkpoints", 1) == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--config.model.hidden=32"], "is of another model"),
        (["--config.training.initial={tmp}"], "run folder: got '{tmp}'"),
    ],
)
def test_weights_that_do_not_fit(exported, started, tmp_path, capfd, more, says):
    assert started("--init", exported["ema"], *(word.format(tmp=tmp_path) for word in more)) == 2
    assert says.format(tmp=tmp_path) in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_tokenizer_of_the_data_must_be_the_weights_own(worded, started, tmp_path, capfd):
    assert main(["import", str(worded), "--workdir", str(tmp_path / "other")]) == 0
    assert started("--init", tmp_path / "other") == 2
    assert "training.initial: got" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_an_imported_model_is_trained_on_text(worded, small_text, tmp_path, capfd):
    assert main(["import", str(worded), "--workdir", str(tmp_path / "run")]) == 0
    data = ["--config.data.source=text", f"--config.data.path={small_text}"]
    steps = ["--config.training.steps=2", "--config.training.batch=8", "--config.training.evaluate_batches=1"]
    command = ["train", "--init", str(tmp_path / "run"), "--workdir", str(tmp_path / "new"), *data, *steps]
    assert main(command) == 0
    model = hdlm.load(tmp_path / "new")
    assert (model.tokenizer.name, model.parts.loss.reading, model.step) == ("byte_bpe", "hybrid", 2)
    assert np.isneginf(model.logits(np.zeros((1, 4), int))[..., -1]).all()  # ours now
