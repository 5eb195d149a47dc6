"""Plans of the real training step: the pod-scale experiments on their slices, and what is refused."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest

from hdlm_jax import config as configs
from hdlm_jax.__main__ import main
from hdlm_jax.errors import UserError
from hdlm_jax.planning import plan, program

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = ROOT / "experiments" / "scale" / "epsilon.py"


@functools.cache
def runs():
    spec = importlib.util.spec_from_file_location("scale_epsilon", EXPERIMENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RUNS


@pytest.fixture(scope="module")
def libtpu():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed (extra launch)")


@functools.cache
def planned(name, topology=None, mesh=None, batch=None):
    """The plan of a run of experiments/scale, on its own slice or another."""
    own, sizes, _ = runs()[name]
    overrides = {} if batch is None else {"training.batch": batch}
    return plan.plan(configs.load(f"{EXPERIMENT}:{name}", overrides), topology or own, mesh or sizes)


def assert_good(found, largest_all_reduce=0.25):
    assert found["fits"] and found["attention"] == "splash"
    assert found["memory"]["free_share"] >= 0.3
    assert found["collectives"]["whole_batch"] == []
    assert found["collectives"]["all_reduce_share"] < largest_all_reduce


def test_130m_on_v5e(libtpu):
    """The one compilation of the first tier; about a minute on 2 cores."""
    found = planned("130m-v5e")
    assert_good(found)
    assert found["tokens_per_chip"] == 256 * 1024 / 16
    # in each block a weight is gathered once forward and once backward, and scattered once; head and embedding once
    kinds = found["collectives"]["by_kind"]
    assert kinds["all-gather"]["count"] == 2 * 4 * 12 + 2 and kinds["reduce-scatter"]["count"] == 4 * 12 + 2
    parameters = 12 * 12 * 768**2 + 2 * 768 * 50_048
    assert found["flops"]["model"] > 6 * parameters * 256 * 1024
    assert found["flops"]["executed_per_chip"] * 16 > found["flops"]["model"]
    assert found["memory"]["params"] == pytest.approx(4 * parameters / 4, rel=0.02)
    assert 0.02 < found["estimate"]["mfu"] < 1
    assert len(found["largest_buffers"]) >= 5 and any(buffer["source"] for buffer in found["largest_buffers"])
    text = plan.table(found)
    assert "FITS" in text and "ESTIMATE (compiler's model, never measured)" in text and "reduce-scatter" in text
    json.dumps(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1b-v5p", "1b-v6e", "8b-v5p"])
def test_the_largest_runs_on_their_slices(libtpu, name):
    assert_good(planned(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(runs()) - {"130m-v5e", "1b-v5p", "1b-v6e", "8b-v5p"}))
def test_every_run_fits_its_slice(libtpu, name):
    found = planned(name)
    assert found["fits"] and found["memory"]["free_share"] >= 0.3
    assert found["collectives"]["whole_batch"] == []


@pytest.mark.slow
def test_weak_scaling(libtpu):
    """From 16 to 256 chips at the same tokens per chip."""
    small, large = planned("130m-v5e"), planned("130m-v5e", "v5e:16x16", (64, 4, 1), 4096)
    assert small["tokens_per_chip"] == large["tokens_per_chip"]
    for a, b in (
        (small["flops"]["executed_per_chip"], large["flops"]["executed_per_chip"]),
        (small["memory"]["peak"], large["memory"]["peak"]),
    ):
        assert b == pytest.approx(a, rel=0.1)


@pytest.mark.slow
def test_a_program_that_does_not_fit_says_what_to_change(libtpu):
    given = {"model.remat": "none", "model.attention": "xla", "training.batch": 2048}
    config = configs.load(f"{EXPERIMENT}:130m-v5e", given)
    found = plan.plan(config, "v5e:2x2", (1, 4, 1))
    assert not found["fits"]
    assert any("model.remat=full" in tip for tip in found["advice"]) and "DOES NOT FIT" in plan.table(found)


@pytest.mark.slow
def test_the_sampler(libtpu):
    config = configs.load(f"{ROOT}/experiments/quickstart.py", {"training.batch": 8})
    found = plan.plan(config, "v5e:2x2", (4, 1, 1), what="sample")
    assert found["fits"] and found["memory"]["params"] > 0


@pytest.mark.slow
def test_two_slices_join_along_data(libtpu):
    config = configs.load(f"{EXPERIMENT}:130m-v5e", {"training.batch": 512})
    assert plan.plan(config, "v5e:4x4", (8, 4, 1), slices=2)["chips"] == 32


BAD = [
    ("--topology: got 'v7:4x4'", ["--topology", "v7:4x4"]),
    ("--mesh: got '3,4'; allowed: three sizes", ["--mesh", "3,4"]),
    ("--mesh: got '8 x 4 x 1'; allowed: sizes that multiply to the 16 devices", ["--mesh", "8,4,1"]),
    ("--slices: got 0; allowed: a positive integer", ["--slices", "0"]),
    ("--what: got 'serve'; allowed: 'sample', 'train'", ["--what", "serve"]),
    ("training.batch: got 100; allowed: a positive multiple of 16", ["--config.training.batch=100"]),
    ("--vocabulary: got 0", ["--vocabulary", "0"]),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[0].split(";")[0])
def test_bad_input(libtpu, case, capsys):
    message, arguments = case
    command = ["plan", "--config", f"{EXPERIMENT}:130m-v5e", *arguments]
    command += [] if "--topology" in arguments else ["--topology", "v5e:4x4"]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"hdlm: {message}")


def test_sizes_of_a_tree_on_one_device(libtpu):
    from hdlm_jax.planning import chips

    mesh = chips.mesh(chips.parse("v5e:4x4"), (4, 4, 1))
    config = configs.load(f"{EXPERIMENT}:130m-v5e")
    made = program.training(config, mesh, 50_000)
    assert program.per_device(made.held["batch"]) == 4 * 256 * 1024 // 16
    assert made.executed > made.work, "the blocks are computed anew in the backward pass"


def test_an_unknown_program():
    with pytest.raises(UserError, match="--what: got 'serve'"):
        plan.plan(configs.default(), "v5e:4x4", (4, 4, 1), what="serve")
