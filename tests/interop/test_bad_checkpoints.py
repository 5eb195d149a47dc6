"""Published folders that are refused: one line that says what is wrong, and nothing written."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hdlm_jax.__main__ import main
from hdlm_jax.errors import UserError
from hdlm_jax.interop import folders as place
from hdlm_jax.interop import published
from tests.interop.vocabulary import small_vocabulary


@pytest.fixture
def refused(folders, tmp_path, capfd):
    """(spoil, says, ...): a spoilt copy of a published folder is refused by `hdlm import`, which leaves nothing."""

    def check(spoil, *says, family="epsilon", more=()):
        source = shutil.copytree(folders[family], tmp_path / "source")
        spoil(source)
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        status = main(["import", str(source), "--workdir", str(tmp_path / "new" / "run"), *more])
        out, err = capfd.readouterr()
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        for text in says:
            assert text in err
        assert sorted(tmp_path.rglob("*")) == before

    return check


def tensors(change):
    def spoil(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return spoil


def fields(**changes):
    """Sets fields of config.json, `__` for the dot; None takes one away."""

    def spoil(folder):
        tree = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            *heads, leaf = name.split("__")
            block = tree
            for head in heads:
                block = block[head]
            block[leaf] = value
            if value is None:
                del block[leaf]
        (folder / "config.json").write_text(json.dumps(tree))

    return spoil


# ---- the weights


def test_everything_that_is_wrong_with_the_tensors_is_listed_at_once(refused):
    def change(found):
        del found["blocks.0.attn_out.weight"]
        found["blocks.0.extra"] = np.zeros(3, np.float32)
        found["blocks.1.norm1.weight"] = np.ones(65, np.float32)
        found["blocks.1.mlp.0.bias"] = np.zeros(256, np.int32)
        found["output_layer.linear.bias"][96] = np.nan
        found["blocks.0.mlp.2.weight"][3, 4] = np.inf
        found["rotary_emb.inv_freq"] *= 2

    refused(
        tensors(change),
        "model.safetensors: not the tensors of this model. missing: blocks.0.attn_out.weight; ",
        "unexpected: blocks.0.extra; ",
        "of another shape: blocks.1.norm1.weight ([65], not [64]); ",
        "of another dtype: blocks.1.mlp.0.bias (I32, not F32, F16, BF16); ",
        "not finite: blocks.0.mlp.2.weight, output_layer.linear.bias; ",
        "not those of base 10000: rotary_emb.inv_freq",
    )


@pytest.mark.parametrize("dtype", [np.float64, np.int64])
def test_wide_numbers_are_refused(refused, dtype):
    widen = tensors(lambda found: found.update({n: x.astype(dtype) for n, x in found.items()}))
    refused(widen, "of another dtype: ", "and 14 more")


@pytest.mark.parametrize("keep", [4, 200, 100_000])
def test_a_truncated_file(refused, keep):
    def spoil(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])

    refused(spoil, "model.safetensors: not a whole safetensors file", f"({keep:,} bytes; ", "fetch or write it again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint.pth", "model.pt"])
def test_a_pickle_is_refused_with_what_to_do(refused, name):
    def spoil(folder):
        (folder / "model.safetensors").rename(folder / name)

    refused(
        spoil,
        f"has its weights as a pickle ({name}), which can run any program when it is read; allowed: model.safetensors",
        f"safetensors.torch.save_file(torch.load('{name}', weights_only=True), 'model.safetensors')",
    )


def test_no_weights_at_all(refused):
    refused(lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors in")


def test_the_weights_of_the_other_family(refused):
    change = fields(model_type="gamma_hybrid", **{f"model__{name}": True for name in SWITCHES})
    refused(change, "missing: blocks.0.adaLN_modulation.bias, blocks.0.adaLN_modulation.weight")


SWITCHES = ("scale_by_sigma", "transformer_sigma_conditioning", "hybrid_sigma_embedding", "use_timestep_embedding")

# ---- the config

CONFIGS = [
    (
        {"model__hidden_size": 128, "model__n_blocks": 3, "model__n_heads": 8, "tokenizer__tokens": 95},
        "config.json does not fit model.safetensors: model.n_blocks is 3 there and 2 here;"
        " tokenizer.tokens is 95 there and 96 here; model.hidden_size is 128 there and 64 here;"
        " model.n_heads is 8 there and 4 here",
    ),
    ({"model_type": "gama_hybrid"}, "config.json: model_type: got 'gama_hybrid' (did you mean 'gamma_hybrid'?);"),
    ({"model_type": "delta_hybrid"}, "allowed: 'epsilon_hybrid', 'gamma_hybrid'"),
    ({"model_type": None}, "config.json: model_type: got None; allowed: a value"),
    ({"model": None}, "config.json: model.length: got None"),
    ({"training__epsilon": None}, "config.json: training.epsilon: got None"),
    ({"training__epsilon": "much"}, "config.json: training.epsilon: got 'much'; allowed: a number"),
    ({"training__epsilon": 1.5}, "noising.epsilon: got 1.5"),
    ({"training__loss_type": "other"}, "config.json: training.loss_type: got 'other'; allowed: 'hybrid', 'standard'"),
    ({"model__n_heads": 0}, "config.json: model.n_heads: got 0; allowed: a positive whole number"),
    ({"model__length": 32.5}, "config.json: model.length: got 32.5; allowed: a whole number"),
    ({"type": "sideways"}, "config.json: type: got 'sideways'; allowed: 'aligned', 'shifted'"),
    ({"annealing__type": "blok"}, "config.json: annealing.type: got 'blok' (did you mean 'block'?)"),
    ({"annealing__width": 0}, "config.json: annealing.width: got 0"),
    ({"annealing__attention__block_type": "causal"}, "annealing.attention.block_type: got 'causal'; allowed: 'full'"),
    ({"model__scale_by_sigma": True}, "model.scale_by_sigma: got True; allowed: False for model_type 'epsilon_hybrid'"),
]


@pytest.mark.parametrize(("changes", "says"), CONFIGS, ids=str)
def test_a_config_that_does_not_fit(refused, changes, says):
    refused(fields(**changes), says)


def test_the_width_of_the_noise_level_embedding(refused):
    refused(fields(model__cond_dim=64), "model.cond_dim is 64 there and 32 here", family="gamma")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", "{", "config.json: cannot be read: Expecting property name"),
        ("config.json", "[1]", "config.json: got 'list'; allowed: an object with the training config"),
        ("config.yaml", "a: [", "config.yaml: cannot be read: while parsing"),
    ],
)
def test_a_config_that_is_none(refused, name, content, says):
    def spoil(folder):
        (folder / "config.json").unlink()
        (folder / name).write_text(content)

    refused(spoil, says)


# ---- the tokenizer


def test_a_tokenizer_of_another_vocabulary(refused):
    def spoil(folder):
        (folder / "tokenizer.json").write_text(small_vocabulary())

    says = (
        "--tokenizer: got 'a vocabulary of 271 tokens in {}'; allowed: one of 96 tokens, as in the checkpoint's config"
    )
    refused(spoil, says.split("{}")[0], says.split("{}")[1])


def test_a_tokenizer_that_is_not_there(refused):
    refused(lambda folder: None, "data.tokenizer: got 'vocab'", more=("--tokenizer", "vocab"))


def test_what_is_not_to_be_used_is_not_read(folders, tmp_path):
    source = shutil.copytree(folders["epsilon"], tmp_path / "source")
    (source / "tokenizer.json").write_text(small_vocabulary())
    assert published.read(source, "none").tokenizer.name == "tokens"


# ---- the run folder


def test_a_run_folder_that_is_there(folders, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    assert main(["import", str(folders["epsilon"]), "--workdir", str(tmp_path)]) == 2
    assert f"--workdir: got '{tmp_path}'; allowed: a new or empty folder" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), place.whole(tmp_path / "new", "OUT") as partial:
        (partial / "half").write_text("x")
        assert not (tmp_path / "new").exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="OUT: .* cannot be written"), place.whole(tmp_path / "file" / "new", "OUT"):
        pass
