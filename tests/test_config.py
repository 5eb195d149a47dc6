"""The experiment: JSON in and out, overrides and their types, differences, experiment files."""

import json
from pathlib import Path

import pytest

from hdlm_jax import config as configs
from hdlm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))


def changed(**fields):
    return configs.override(configs.default(), {name.replace("__", "."): value for name, value in fields.items()})


def tree(config):
    return json.loads(configs.to_json(config))


# ---- JSON


@pytest.mark.parametrize("size", ["", *configs.SIZES])
def test_json_round_trip(size):
    config = configs.sized(configs.default(), size)
    assert configs.to_json(configs.from_json(configs.to_json(config))) == configs.to_json(config)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_json_round_trip_of_every_experiment(path):
    config = configs.load(str(path))
    again = configs.from_json(configs.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert again.is_locked
    assert isinstance(again.loss.noise_range, tuple)


def test_json_is_sorted_and_ends_with_a_line():
    text = configs.to_json(configs.default())
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_a_run_older_than_a_dial_of_the_sampler_is_read():
    t = tree(configs.default())
    del t["sampler"]["guidance"], t["sampler"]["threshold"]
    assert configs.from_json(json.dumps(t)).to_dict() == configs.default().to_dict()
    del t["sampler"]
    with pytest.raises(UserError, match=r"config\.json: got 'no sampler\."):
        configs.from_json(json.dumps(t))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t["model"].pop("hidden"), r"config\.json: got 'no model\.hidden'; allowed: every field"),
        (lambda t: t["model"].update(hiden=3), r"config\.json: got 'model\.hiden' \(did you mean 'model\.hidden'\?\)"),
        (lambda t: t.pop("optimizer"), r"config\.json: got 'no optimizer\.beta1, optimizer\.beta2, "),
        (lambda t: t["model"].update(hidden=1.5), r"model\.hidden: got 1\.5; allowed: a whole number"),
        (lambda t: t["model"].update(hidden=[1]), r"model\.hidden: got \(1,\); allowed: a whole number"),
        (lambda t: t["model"].update(hidden=None), r"model\.hidden: got None; allowed: a value"),
        (lambda t: t["model"].update(hidden={}), r"config\.json: got 'no model\.hidden'"),
        (lambda t: t["loss"].update(noise_range=[0.5]), r"loss\.noise_range: got \(0\.5,\); allowed: 2 numbers"),
        (lambda t: t["loss"].update(inverse_survival=3), r"loss\.inverse_survival: got 3; allowed: true or false"),
    ],
)
def test_json_that_is_not_an_experiment_is_refused_by_field(spoil, says):
    t = tree(configs.default())
    spoil(t)
    with pytest.raises(UserError, match=says):
        configs.from_json(json.dumps(t))


# ---- overrides


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model.hidden", "64", 64),
        ("model.hidden", 64, 64),
        ("mesh.data", "-1", -1),
        ("optimizer.learning_rate", "1e-3", 1e-3),
        ("optimizer.learning_rate", 1, 1.0),
        ("model.remat", "none", "none"),
        ("loss.inverse_survival", "False", False),
        ("loss.inverse_survival", "1", True),
        ("loss.noise_range", "0.3,0.8", (0.3, 0.8)),
        ("loss.noise_range", "(0.3, 0.8)", (0.3, 0.8)),
        ("hyperschedule.width", "8", 8),
        ("hyperschedule.rate", "3/2", "3/2"),
        ("hyperschedule.rate", "none", None),
        ("noising.epsilon", "none", None),
        ("noising.epsilon", "0.1", 0.1),
        ("seed", "3", 3),
        ("data.path", "", ""),
    ],
)
def test_a_text_is_read_as_the_fields_type(name, text, value):
    config = changed(hyperschedule__rate="1", noising__epsilon=0.5)
    found = configs.override(config, {name: text})
    for part in name.split("."):
        found = found[part]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("modle.x", "1", r"modle\.x: got 'modle' \(did you mean 'model'\?\); allowed: 'data', .*'training'"),
        (
            "model.hiden",
            "1",
            r"model\.hiden: got 'hiden' \(did you mean 'hidden'\?\); allowed: 'attention', 'blocks', ",
        ),
        ("sead", "1", r"sead: got 'sead' \(did you mean 'seed'\?\)"),
        ("model", "1", r"model: is a block; allowed: one of its fields, as model\."),
        ("model.hidden.x", "1", r"model\.hidden\.x: got 'x'; allowed: nothing below 'hidden'"),
        ("model.hidden", "many", r"model\.hidden: got 'many'; allowed: a whole number"),
        ("model.hidden", "1.5", r"model\.hidden: got '1\.5'; allowed: a whole number"),
        ("model.hidden", "none", r"model\.hidden: got 'none'; allowed: a whole number"),
        ("model.hidden", 1.5, r"model\.hidden: got 1\.5; allowed: a whole number"),
        ("model.dropout", "low", r"model\.dropout: got 'low'; allowed: a number"),
        ("model.dropout", None, r"model\.dropout: got None; allowed: a value"),
        ("model.prediction", 3, r"model\.prediction: got 3; allowed: a text"),
        ("hyperschedule.width", "x", r"hyperschedule\.width: got 'x'; allowed: a whole number"),
        ("loss.inverse_survival", "maybe", r"loss\.inverse_survival: got 'maybe'; allowed: true or false"),
        ("loss.noise_range", "a,b", r"loss\.noise_range: got 'a,b'; allowed: numbers separated by commas"),
        ("loss.noise_range", "0.5", r"loss\.noise_range: got \(0\.5,\); allowed: 2 numbers"),
        ("loss.noise_range", 0.5, r"loss\.noise_range: got 0\.5; allowed: 2 numbers"),
    ],
)
def test_a_wrong_name_or_type_is_refused_by_field(name, given, says):
    config = configs.default()
    with pytest.raises(UserError, match=f"^{says}"):
        configs.override(config, {name: given})
    assert configs.differences(configs.default(), config) == ""


def test_default_is_locked_and_fresh_every_time():
    config = configs.default()
    with pytest.raises(AttributeError):
        config.model.hiden = 3
    config.model.hidden = 3
    assert configs.default().model.hidden != 3


def test_sizes_change_what_they_say():
    assert configs.sized(configs.default(), "smoke").training.steps == configs.SIZES["smoke"]["training.steps"]
    with pytest.raises(UserError, match=r"--config argument: got 'smok' \(did you mean 'smoke'\?\)"):
        configs.sized(configs.default(), "smok")


def test_block_fields_leaves_out_what_is_not_given():
    block = changed(hyperschedule__kind="slide", hyperschedule__width=4, hyperschedule__rate="1").hyperschedule
    assert configs.block_fields(block) == ("slide", {"width": 4, "rate": "1"})


def test_differences_name_every_field_once():
    other = changed(seed=1, noising__epsilon=0.5, loss__noise_range="0.3,0.8")
    assert configs.differences(configs.default(), other).splitlines() == [
        "  loss.noise_range: [0.0, 1.0] in the run folder, [0.3, 0.8] in this command",
        "  noising.epsilon: None in the run folder, 0.5 in this command",
        "  seed: 0 in the run folder, 1 in this command",
    ]
    assert configs.differences(other, other) == ""


# ---- experiment files

HEADER = "from hdlm_jax.config import default, sized\ndef get_config(arg=''):\n    c = default()\n"


def test_an_experiment_file_takes_its_argument_and_overrides(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(f"{HEADER}    c.model.hidden = 64\n    return sized(c, arg)\n")
    assert configs.load(str(file)).model.hidden == 64
    assert configs.load(f"{file}:smoke").model.hidden == 16
    assert configs.load(f"{file}:smoke", {"model.hidden": "32"}).model.hidden == 32


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1\n", "a file that defines get_config"),
        ("def get_config(:\n", "line 1: SyntaxError: invalid syntax"),
        ("import nothing_like_it\n", "line 1: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def get_config(arg=''):\n    pass\n", "a get_config that returns the experiment"),
        (f"{HEADER}    c.model.hiden = 3\n    return c\n", 'line 4: AttributeError: .*Did you mean "hidden"'),
        (f"{HEADER}    c.modle.hidden = 3\n    return c\n", 'line 4: AttributeError: .*Did you mean "model"'),
        (f"{HEADER}    c.model.hidden = 'x'\n    return c\n", "line 4: TypeError: .*cannot be casted"),
        (f"{HEADER}    return sized(c, 'tiny')\n", "--config argument: got 'tiny'; allowed: 'base', 'smoke'"),
    ],
)
def test_a_bad_experiment_file_is_told_in_one_line(tmp_path, source, says):
    file = tmp_path / "x.py"
    file.write_text(source)
    with pytest.raises(UserError, match=says) as caught:
        configs.load(str(file))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400
    assert "--config" in str(caught.value)


def test_an_unknown_experiment_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"--config: got 'experiments/quickstrat\.py' \(did you mean .*quickstart\.py'"):
        configs.load("experiments/quickstrat.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--config: got 'x\.py'; allowed: an experiment file"):
        configs.load("x.py")
