"""The run folder: one experiment on one data set per folder, one live process."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from hdlm_jax import config as configs
from hdlm_jax.errors import UserError
from hdlm_jax.training import run_folder

MANIFEST = {
    "corpus": {"name": "text a.txt", "sha256": "a" * 64},
    "tokenizer": {"name": "bytes", "num_tokens": 257, "sha256": "b" * 64},
    "length": 32,
}
HOLD = """import sys, pathlib
from hdlm_jax.training import run_folder
with run_folder.locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other_data():
    return MANIFEST | {"corpus": {"name": "text a.txt", "sha256": "c" * 64}}


# ---- one experiment, one data set


def test_claiming_writes_the_experiment_the_environment_and_the_data(tmp_path):
    config = configs.default()
    run_folder.claim(tmp_path, config, MANIFEST)
    assert contents(tmp_path).keys() == {"config.json", "env.json", "data.json"}
    assert configs.to_json(run_folder.read_config(tmp_path)) == configs.to_json(config)
    assert json.loads((tmp_path / "data.json").read_text()) == {k: MANIFEST[k] for k in ("corpus", "tokenizer")}
    env = json.loads((tmp_path / "env.json").read_text())
    assert env.keys() == {"python", "platform", "packages", "devices", "command"}
    assert {"jax", "flax", "numpy"} <= env["packages"].keys()
    assert env["devices"] == {"kind": "cpu", "count": 8, "processes": 1}


def test_claiming_again_changes_nothing(tmp_path):
    run_folder.claim(tmp_path, configs.default(), MANIFEST)
    before = contents(tmp_path)
    run_folder.claim(tmp_path, configs.default(), MANIFEST)
    assert contents(tmp_path) == before


def test_another_experiment_is_refused_with_a_diff_and_nothing_changes(tmp_path):
    run_folder.claim(tmp_path, configs.default(), MANIFEST)
    before = contents(tmp_path)
    other = configs.override(configs.default(), {"model.hidden": "128", "seed": "3"})
    for refusing in (lambda: run_folder.refuse_other(tmp_path, other), lambda: run_folder.claim(tmp_path, other, {})):
        with pytest.raises(UserError, match="--workdir: .* holds another experiment") as caught:
            refusing()
        _, *changes = str(caught.value).splitlines()
        assert changes == [
            "  model.hidden: 256 in the run folder, 128 in this command",
            "  seed: 0 in the run folder, 3 in this command",
        ]
    assert contents(tmp_path) == before


def test_the_same_experiment_on_another_mesh_is_welcome(tmp_path):
    run_folder.claim(tmp_path, configs.default(), MANIFEST)
    before = contents(tmp_path)
    other = configs.override(configs.default(), {"mesh.data": 2, "mesh.fsdp": 4})
    run_folder.claim(tmp_path, other, MANIFEST)
    assert contents(tmp_path) == before


def test_other_data_are_refused_with_both_names_and_nothing_changes(tmp_path):
    run_folder.claim(tmp_path, configs.default(), MANIFEST)
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        run_folder.claim(tmp_path, configs.default(), other_data())
    assert "corpus was 'text a.txt' (sha256 aaaaaaaaaaaa), is 'text a.txt' (sha256 cccccccccccc)" in str(caught.value)
    assert "tokenizer" not in str(caught.value)
    assert contents(tmp_path) == before


# ---- reading


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "run folder: got .*; allowed: a folder with a config.json, written by `hdlm train`"),
        ("{", r"config\.json: not JSON \(line 1\)"),
        ("[]", r"config\.json: got 'list'; allowed: an object"),
        ("{}", r"config\.json: got 'no data\.held_out, "),
        ('{"modle": {"hidden": 3}}', r"config\.json: got 'modle\.hidden' \(did you mean 'model\.hidden'\?\)"),
    ],
)
def test_a_folder_without_a_readable_experiment_is_told(tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        run_folder.read_config(tmp_path)


# ---- one live process


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(tmp_path):
    with run_folder.locked(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()}; allowed: "):
        run_folder.locked(tmp_path).__enter__()
    with run_folder.locked(tmp_path):  # free again
        pass


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    new = tmp_path / "new"
    with pytest.raises(UserError), run_folder.locked(new):
        assert new.is_dir()
        raise UserError("bad data")
    assert not new.exists()


def test_a_folder_that_was_there_or_holds_something_stays(tmp_path):
    with run_folder.locked(tmp_path):
        pass
    assert tmp_path.is_dir()
    new = tmp_path / "new"
    with run_folder.locked(new):
        (new / "x").touch()
    assert (new / "x").exists()


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="--workdir: .* cannot be written to"), run_folder.locked(tmp_path / "x"):
        pass


def test_a_killed_process_frees_its_folder(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid};"), run_folder.locked(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with run_folder.locked(tmp_path):
        shutil.rmtree(tmp_path)
