"""`--help` of the command and of every verb."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hdlm_jax import __version__
from hdlm_jax import config as configs
from hdlm_jax.__main__ import VERBS, main

ROOT = Path(__file__).resolve().parents[2]
KINDS = [("draw", "hyperschedule"), ("draw", "visibility"), ("draw", "loss"), ("bench", "train"), ("bench", "sample")]
KINDS += [("diagnose", "repair")]
FLAGS = {
    ("prepare",): ["--config", "--data", "--out"],
    ("train",): ["--config", "--init", "--workdir"],
    ("import",): ["--workdir", "--tokenizer"],
    ("export",): ["--format", "--weights"],
    ("evaluate",): ["--run", "--text", "--draws", "--batch", "--windows", "--seed", "--weights", "--json"],
    ("diagnose", "context"): ["--run", "--weights", "--windows", "--seed", "--batch", "--draws", "--out"],
    ("diagnose", "calibration"): ["--token", "--bins", "--draws", "--out"],
    ("diagnose", "repair"): ["--sampler", "--eta", "--share", "--calls", "--batch", "--out"],
    ("diagnose", "texts"): ["--judge", "--clusters", "--causal-judge", "--causal-python", "--out"],
    ("sample",): [
        *("--run", "--num", "--prompt", "--length", "--seed", "--weights", "--out"),
        *("--sampler", "--eta", "--temperature", "--top-p", "--top-k"),
        *("--hyperschedule", "--steps", "--width", "--rate", "--block"),
    ],
    ("draw", "hyperschedule"): ["--config", "--kind", "--length", "--width", "--rate", "--block", "--steps", "--out"],
    ("draw", "loss"): ["--run", "--out"],
    ("bench", "train"): ["--config", "--vocabulary", "--repeats", "--out"],
    ("bench", "sample"): ["--config", "--kind", "--width", "--rate", "--length", "--batch", "--repeats", "--out"],
}


@pytest.fixture
def help_of(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    def read(*words):
        with pytest.raises(SystemExit) as caught:
            main([*words, "--help"])
        out, err = capsys.readouterr()
        assert (caught.value.code, err) == (0, "")
        return out

    return read


def test_the_command_lists_its_verbs_with_what_they_do(help_of):
    text = help_of()
    for verb, summary in VERBS.items():
        assert re.search(rf"\n +{verb} +{re.escape(summary)}\n", text)
    assert "--config.model.hidden=128" in text


@pytest.mark.parametrize("words", [*((verb,) for verb in VERBS), *KINDS], ids=" ".join)
def test_every_help_reads_well(words, help_of):
    text = help_of(*words)
    assert text.startswith(f"usage: hdlm {' '.join(words)} [-h]")
    assert all(len(line) <= 120 for line in text.splitlines())
    for flag in FLAGS.get(words, []):
        assert f"  {flag} " in text or f"  {flag}\n" in text
    if len(words) == 1:
        assert f"\n  hdlm {words[0]} " in text, "an example to copy"


def test_every_flag_is_explained(help_of):
    """A flag without a help text stands alone on its line or is followed by another one."""
    for words in FLAGS:
        lines = help_of(*words).split("options:")[1].splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            if line.startswith("  -"):
                explained = "  " in line.strip() or after.startswith(" " * 10)
                assert explained, (words, line)


def test_help_and_version_come_at_once(capsys):
    """Nothing heavy is imported to print them."""
    program = (
        "import sys\nfrom hdlm_jax.__main__ import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('jax', 'flax', 'orbax', 'grain', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"hdlm_jax {__version__}\n")


def test_every_experiment_in_a_documented_command_loads():
    """An argument that no experiment knows is refused by `load`."""
    texts = [ROOT / "README.md", *sorted((ROOT / "hdlm_jax" / "verbs").glob("*.py"))]
    pattern = re.compile(r"experiments/[\w/]+\.py(?::[a-z0-9][\w.-]*)?")
    named = {found for path in texts for found in pattern.findall(path.read_text())}
    assert {"experiments/quickstart.py", "experiments/scale/epsilon.py:130m-v5e"} <= named
    for experiment in sorted(named):
        configs.load(str(ROOT / experiment))
