"""The authors' two tiny networks as published folders, their goldens, and the runs imported from them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hdlm_jax.interop import published
from tests.interop.vocabulary import small_vocabulary

REFERENCE = Path(__file__).parents[1] / "reference"


def gamma_tensors():
    folder = REFERENCE / "gamma_tiny"
    tensors = dict(np.load(folder / "rest.npz"))
    for i in range(2):
        tensors |= {f"blocks.{i}.{name}": x for name, x in np.load(folder / f"block_{i}.npz").items()}
    buffer = "rotary_emb.inv_freq"
    return tensors | {buffer: load_file(REFERENCE / "epsilon_tiny" / "model.safetensors")[buffer]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family -> published folder. Copy one before changing anything in it."""
    place = tmp_path_factory.mktemp("published")
    for family in ("epsilon", "gamma"):
        (place / family).mkdir()
        shutil.copy(REFERENCE / f"{family}_tiny" / "config.json", place / family)
    shutil.copy(REFERENCE / "epsilon_tiny" / "model.safetensors", place / "epsilon")
    save_file(gamma_tensors(), place / "gamma" / "model.safetensors", {"format": "pt"})
    return {family: place / family for family in ("epsilon", "gamma")}


@pytest.fixture(scope="session")
def goldens():
    """Family -> what the authors' code gave."""
    gamma = REFERENCE / "gamma_tiny"
    return {
        "epsilon": np.load(REFERENCE / "epsilon_tiny" / "io.npz"),
        "gamma": dict(np.load(gamma / "io.npz")) | {f"more/{k}": v for k, v in np.load(gamma / "more.npz").items()},
    }


@pytest.fixture(scope="session")
def imported(folders, tmp_path_factory):
    """Family -> run folder."""
    place = tmp_path_factory.mktemp("imported")
    for family, folder in folders.items():
        published.import_folder(folder, place / family)
    return {family: place / family for family in folders}


@pytest.fixture(scope="session")
def worded(tmp_path_factory):
    """A published folder of a shifted epsilon network, trained flat, with a small byte-level BPE vocabulary."""
    folder = tmp_path_factory.mktemp("worded") / "published"
    folder.mkdir()
    text = small_vocabulary()
    (folder / "tokenizer.json").write_text(text)
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    config = json.loads((REFERENCE / "epsilon_tiny" / "config.json").read_text())
    config |= {"type": "shifted", "tokenizer": {"tokens": len(json.loads(text)["model"]["vocab"]) + 1, "model": "gpt2"}}
    config["annealing"] |= {"width": 32, "tau": 8, "eval_tau": 8}
    (folder / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(0), load_file(REFERENCE / "epsilon_tiny" / "model.safetensors")
    rows = config["tokenizer"]["tokens"] + 1
    for name in ("vocab_embed.embedding", "output_layer.linear.weight", "output_layer.linear.bias"):
        tensors[name] = rng.normal(0, 0.3, (rows, *tensors[name].shape[1:])).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder
