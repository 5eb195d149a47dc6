"""Bad input on the command line: one line that names the field and what is allowed, status 2, nothing lost.

Each row is what is typed after a common beginning, and what the line must say.
"""

import shutil
from pathlib import Path

import pytest

from hdlm_jax.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
QUICK = f"{ROOT}/experiments/quickstart.py:smoke"
POSITIVE = "allowed: a positive integer"

COMMANDS = [
    ("", "no VERB given; allowed: prepare, train, evaluate, diagnose, sample, import, export, plan, draw, bench"),
    ("trian", "VERB: got 'trian' (did you mean 'train'?); allowed: 'bench', 'diagnose', 'draw'"),
    ("train", "the following arguments are required: --workdir; see `hdlm train --help`"),
    ("train --workdir {work}", "one of the arguments --config --init is required; see `hdlm train --help`"),
    ("train --config {quick} --init {tmp} --workdir {work}", "argument --init: not allowed with argument --config"),
    ("train --init {tmp} --workdir {work}", "run folder: got '{tmp}'; allowed: a folder with a config.json"),
    ("import {tmp}", "required: --workdir"),
    ("import {tmp}/none --workdir {work}", "DIR: got '{tmp}/none'; allowed: a folder with a published checkpoint"),
    ("import {tmp} --workdir {work}", "DIR: got '{tmp}'; allowed: a folder with config.json or config.yaml and model"),
    ("export {tmp} {work}", "run folder: got '{tmp}'; allowed: a folder with a config.json"),
    (
        "export {tmp} {work} --format onnx",
        "--format: got 'onnx'; allowed: 'huggingface', 'published', 'safetensors', 'stablehlo'",
    ),
    ("export {run} {work} --weights mean", "weights: got 'mean'; allowed: 'ema', 'raw'"),
    ("export {run} {tmp}", "OUT: got '{tmp}'; allowed: a new or empty folder"),
    ("train --config {quick}", "required: --workdir"),
    ("train --config {tmp}/nope.py --workdir {work}", "--config: got '{tmp}/nope.py'"),
    ("train --config {quick}st --workdir {work}", "--config argument: got 'smokest' (did you mean 'smoke'?)"),
    ("train --config {quick} --workdir {binary}", "--workdir: {binary} cannot be written to"),
    ("train --config {quick} --workdir s3://bucket/run", "--workdir: got 's3://bucket/run'; allowed: a folder of this"),
    ("draw", "required: PICTURE"),
    ("draw hypershedule", "argument PICTURE: invalid choice: 'hypershedule' (choose from 'hyperschedule',"),
    ("bench generate", "argument WHAT: invalid choice: 'generate' (choose from 'train', 'sample',"),
]

SLIDE = "--config.hyperschedule.kind=slide --config.hyperschedule.width=8 --config.hyperschedule.rate=1"

# after: train --config experiments/quickstart.py:smoke --workdir {work} --config.data.prepared={run}/data SLIDE
TRAIN = [
    ("--bogus=3", "--bogus=3: no such argument; see `hdlm train --help`"),
    ("extra", "extra: no such argument"),
    ("--config.model.hidden", "--config.model.hidden: no value given"),
    ("--config.modle.x=1", "modle.x: got 'modle' (did you mean 'model'?); allowed: 'data', 'hyperschedule'"),
    ("--config.model.hiden=1", "model.hiden: got 'hiden' (did you mean 'hidden'?); allowed: 'attention', 'blocks'"),
    ("--config.model=1", "model: is a block"),
    ("--config.model.hidden=many", "model.hidden: got 'many'; allowed: a whole number"),
    ("--config.model.hidden -16", f"model.hidden: got -16; {POSITIVE}"),
    ("--config.model.heads=3", "model.heads: got 3; allowed: a divisor of model.hidden = 16"),
    ("--config.model.heads=16", "model.heads: got 16; allowed: an even head size"),
    ("--config.model.blocks=0", f"model.blocks: got 0; {POSITIVE}"),
    ("--config.model.dropout=1", "model.dropout: got 1.0; allowed: a number in [0, 1)"),
    ("--config.model.dropout=nan", "model.dropout: got nan"),
    ("--config.model.prediction=shfted", "model.prediction: got 'shfted'; allowed: 'aligned', 'shifted'"),
    ("--config.model.visibility=none", "model.visibility: got 'none'; allowed: 'full', 'prefix'"),
    ("--config.model.visibility=full", "hyperschedule.kind: got 'slide' with model.visibility 'full'; allowed: 'flat'"),
    ("--config.model.remat=some", "model.remat: got 'some'; allowed: 'none', 'dots', 'full'"),
    ("--config.model.attention=flash", "model.attention: got 'flash'; allowed: 'auto', 'xla', 'splash', 'cudnn'"),
    ("--config.model.attention=splash", "model.attention: got 'splash'; allowed here: 'xla' or 'auto' (splash runs on"),
    ("--config.model.dtype=float16", "model.dtype: got 'float16'; allowed: 'float32', 'bfloat16'"),
    ("--config.model.dtype=float64", "model.dtype: got 'float64'; allowed: 'float32', 'bfloat16'"),
    ("--config.model.conditioning=-1", "model.conditioning: got -1"),
    ("--config.model.context_group=0", f"model.context_group: got 0; {POSITIVE}"),
    ("--config.training.initial={tmp}", "run folder: got '{tmp}'; allowed: a folder with a config.json"),
    ("--config.model.interpolation=0.5", "model.interpolation: got 0.5; allowed: 0 for a network that does not see"),
    ("--config.model.interpolation=-1", "model.interpolation: got -1.0; allowed: 0 (off) or a positive number"),
    ("--config.model.rotary_base=0", "model.rotary_base: got 0.0; allowed: a positive number"),
    ("--config.data.length=0", "data.length: got 0"),
    ("--config.data.length=64", "data.length: got 64; allowed: 32, as in {run}/data"),
    ("--config.data.prepared={tmp}", "data.prepared: got '{tmp}'; allowed: a folder that `hdlm prepare` wrote"),
    ("--config.hyperschedule.kind=slid", "hyperschedule.kind: got 'slid' (did you mean 'slide'?); allowed: 'ar_"),
    ("--config.hyperschedule.width=33", "hyperschedule.width: got 33; allowed: a whole number from 1 to 32"),
    ("--config.hyperschedule.rate=3", "hyperschedule.rate: got '3'; allowed: width / rate a whole number of calls"),
    ("--config.hyperschedule.rate=none", "hyperschedule.rate: got None; allowed: a value, since 'slide' needs one"),
    ("--config.hyperschedule.kind=quenched", "hyperschedule.rate: got '1'"),
    ("--config.noise_schedule.kind=sine", "noise_schedule.kind: got 'sine' (did you mean 'cosine'?); allowed: 'clip"),
    (
        "--config.noise_schedule.kind=polynomial --config.noise_schedule.w=none",
        "noise_schedule.w: got None; allowed: a value, since 'polynomial' needs one",
    ),
    (
        "--config.noise_schedule.kind=linear --config.noise_schedule.w=none --config.noise_schedule.eps=1",
        "noise_schedule.eps: got 1.0; allowed: a number in [0, 1)",
    ),
    (
        "--config.noising.kind=epsilon",
        "noising.kind: got 'epsilon' (did you mean 'epsilon_hybrid'?); allowed: 'absorb'",
    ),
    ("--config.noising.epsilon=1", "noising.epsilon: got 1.0; allowed: a number in [0, 1)"),
    ("--config.noising.epsilon=-0.1", "noising.epsilon: got -0.1; allowed: a number in [0, 1)"),
    ("--config.noising.epsilon=nan", "noising.epsilon: got nan"),
    (
        "--config.noising.kind=gamma_hybrid --config.noising.epsilon=none --config.noising.gamma=1",
        "noising.gamma: got 1.0; allowed: a number in [0, 1)",
    ),
    ("--config.loss.kind=elbo", "loss.kind: got 'elbo'"),
    ("--config.sampler.cache_dtype=half", "sampler.cache_dtype: got 'half'; allowed: '', 'bfloat16', 'float32'"),
    ("--config.model.context_group=3", "model.context_group: got 3 under slide"),
    ("--config.loss.kind=absorb_nelbo", "loss.kind: got 'absorb_nelbo' with noising.kind 'epsilon_hybrid'; allowed"),
    ("--config.loss.token_weight=-1", "loss.token_weight: got -1.0"),
    (
        "--config.loss.noise_range=0.8,0.3",
        "loss.noise_range: got (0.8, 0.3); allowed: two numbers 0 <= low < high <= 1",
    ),
    ("--config.loss.noise_range=0.3", "loss.noise_range: got (0.3,); allowed: 2 numbers"),
    ("--config.loss.noise_range=0.3,0.8", "loss.noise_range: got (0.3, 0.8); allowed: (0, 1) for hyperschedule.kind"),
    ("--config.loss.origin_share=2", "loss.origin_share: got 2.0; allowed: a number in [0, 1]"),
    ("--config.loss.rows_per_chunk=0", f"loss.rows_per_chunk: got 0; {POSITIVE}"),
    (
        "--config.sampler.kind=asc",
        "sampler.kind: got 'asc' (did you mean 'acs'?); allowed: 'acs', 'acs_published', 'an",
    ),
    ("--config.sampler.eta=3", "sampler.eta: got 3.0; allowed: a number in [0, 1]"),
    ("--config.sampler.steps=0", f"sampler.steps: got 0; {POSITIVE}"),
    ("--config.sampler.temperature=-1", "sampler.temperature: got -1.0; allowed: a number >= 0"),
    ("--config.sampler.top_p=0", "sampler.top_p: got 0.0; allowed: a number in (0, 1]"),
    ("--config.sampler.top_k=-1", "sampler.top_k: got -1"),
    ("--config.loss.kind=epsilon_nelbo", "sampler.eta: got 0.25 for a run trained on epsilon_nelbo"),
    ("--config.optimizer.schedule=exp", "optimizer.schedule: got 'exp'; allowed: 'constant', 'cosine', 'linear'"),
    ("--config.optimizer.learning_rate=0", "optimizer.learning_rate: got 0.0; allowed: a positive number"),
    ("--config.optimizer.ema=1", "optimizer.ema: got 1.0; allowed: a number in [0, 1)"),
    ("--config.training.steps=0", f"training.steps: got 0; {POSITIVE}"),
    ("--config.training.batch=7", "training.batch: got 7; allowed: a positive multiple of 8 (training.accumulation x"),
    ("--config.training.accumulation=3", "training.batch: got 8; allowed: a positive multiple of 24"),
    ("--config.training.evaluate_batches=0", f"training.evaluate_batches: got 0; {POSITIVE}"),
    ("--config.training.evaluate_every=-1", "training.evaluate_every: got -1; allowed: 0 (only at the end)"),
    ("--config.training.max_skipped=0", f"training.max_skipped: got 0; {POSITIVE}"),
    ("--config.training.on_save_error=ignore", "training.on_save_error: got 'ignore'; allowed: 'continue', 'stop'"),
    ("--distributed maybe", "--distributed: got 'maybe'; allowed: 'auto', 'off', 'on'"),
    ("--coordinator localhost:1", "--num-processes, --process-id: got None; allowed: all of --coordinator,"),
    ("--profile 3", "--profile: got '3'; allowed: FIRST:COUNT"),
    ("--config.mesh.data=3", "mesh: got 'data=3, fsdp=1, tensor=1'; allowed: sizes that multiply to the 8 devices"),
    ("--config.mesh.tensor=-1", "mesh: got 'data=-1, fsdp=1, tensor=-1'; allowed: one size of -1 at most"),
    # hidden 28 does not divide by 8 devices: seen when the parameters' shapes are known
    (
        "--config.model.hidden=28 --config.mesh.data=1 --config.mesh.fsdp=8",
        "parameter params/blocks/mlp_in/kernel: axis 1 of (1, 28, 112); allowed: a size divisible by 8 (mesh.fsdp)",
    ),
    ("--config.seed=-1", "seed: got -1; allowed: a whole number from 0 to 4294967295"),
    ("--config.seed=99999999999999999999", "seed: got 99999999999999999999"),
]

# after: train --config experiments/quickstart.py:smoke --workdir {work}, and, with --out {work}, after prepare
CORPUS = [
    (
        "--config.data.source=txt",
        "data.source: got 'txt' (did you mean 'text'?); allowed: 'python_docs', 'text', 'tfds'",
    ),
    ("--config.data.source=text", "data.path: got ''; allowed: text files or globs"),
    (
        "--config.data.source=text --config.data.path={tmp}/no*.txt",
        "data.path: got '{tmp}/no*.txt', which names no file",
    ),
    ("--config.data.source=text --config.data.path={empty}", "data.path: got '{empty}', but it is empty"),
    (
        "--config.data.source=text --config.data.path={binary}",
        "data.path: got '{binary}', but it is not UTF-8 at byte 127",
    ),
    ("--config.data.source=text --config.data.path={tmp}", "it is a folder: say '{tmp}/*.txt'"),
    ("--config.data.source=tfds", "data.tfds_name: got ''; allowed: the name of a TFDS dataset"),
    ("{text} --config.data.tokenizer=byte", "data.tokenizer: got 'byte' (did you mean 'bytes'?); allowed: 'a fold"),
    ("{text} --config.data.tokenizer={tmp}/no.model", "data.tokenizer: cannot read '{tmp}/no.model'"),
    ("{text} --config.data.tokenizer=sentencepiece --config.data.vocab_size=9", "data.vocab_size: got 9; allowed: at"),
    ("{text} --config.data.held_out=1", "data.held_out: got 1.0; allowed: a fraction in [0, 1)"),
    ("{text} --config.data.length=30000", "data.length: got 30000; allowed: at most "),
]

RUN = [
    ("evaluate --run {tmp}/none", "run folder: got '{tmp}/none'; allowed: a folder with a config.json"),
    ("evaluate --run {tmp}", "run folder: got '{tmp}'; allowed: a folder with a config.json, written by `hdlm train`"),
    ("evaluate --run {run} --draws 1", "--draws: got 1; allowed: at least 2"),
    ("evaluate --run {run} --draws x", "argument --draws: invalid int value: 'x'"),
    ("evaluate --run {run} --batch 0", f"--batch: got 0; {POSITIVE}"),
    ("evaluate --run {run} --windows -1", "--windows: got -1; allowed: 0 (all) or a positive integer"),
    ("evaluate --run {run} --seed -1", "--seed: got -1; allowed: a whole number from 0"),
    ("evaluate --run {run} --weights mean", "weights: got 'mean'; allowed: 'ema', 'raw'"),
    ("evaluate --run {run} --text {empty}", "text: got '{empty}', but it is empty"),
    ("evaluate --run {run} --text {binary}", "text: got '{binary}', but it is not UTF-8 at byte 127"),
    ("evaluate --run {run} --text {tmp}/none", "text: cannot read '{tmp}/none'"),
    ("evaluate --run {run} --config.model.hidden=3", "--config.model.hidden=3: no such argument; see `hdlm evaluate"),
    ("sample --run {tmp}", "run folder: got '{tmp}'"),
    ("sample --run {run} --num 0", f"--num: got 0; {POSITIVE}"),
    ("sample --run {run} --length 33 --fixed 9=a", "fixed: got {{9: 'a'}}; allowed: nothing for texts past the"),
    ("sample --run {run} --prompt " + 32 * "x", "prompt: got '32 tokens'; allowed: fewer than the text's 32 tokens"),
    ("sample --run {run} --length 8 --prompt " + 8 * "x", "prompt: got '8 tokens'; allowed: fewer than the text's 8"),
    ("sample --run {run} --seed 99999999999999999999", "--seed: got 99999999999999999999"),
    ("sample --run {run} --weights mean", "weights: got 'mean'; allowed: 'ema', 'raw'"),
    ("sample --run {run} --sampler asc", "sampler.kind: got 'asc' (did you mean 'acs'?)"),
    ("sample --run {run} --eta 2", "sampler.eta: got 2.0; allowed: a number in [0, 1]"),
    ("sample --run {run} --temperature -1", "sampler.temperature: got -1.0"),
    ("sample --run {run} --top-p 0", "sampler.top_p: got 0.0"),
    ("sample --run {run} --top-k -1", "sampler.top_k: got -1"),
    ("sample --run {run} --hyperschedule slid", "hyperschedule.kind: got 'slid' (did you mean 'slide'?)"),
    (
        "sample --run {run} --hyperschedule flat",
        "hyperschedule.width: got 32; allowed for this 'prefix' model: at most 8",
    ),
    ("sample --run {run} --hyperschedule block --width 16 --rate 2", "hyperschedule.width: got 16; allowed for this"),
    ("sample --run {run} --hyperschedule block --width 40 --rate 2", "hyperschedule.width: got 40; allowed: a whole"),
    ("draw loss --run {tmp} --out {work}/x.png", "run folder: got '{tmp}'"),
    ("draw hyperschedule --out {work}/x.png", "--config or --kind: got None; allowed: one of them"),
    ("draw hyperschedule --kind slide --out {work}/x.png", "hyperschedule.width: got None; allowed: a value"),
    ("draw hyperschedule --kind quenched --length 0 --out {work}/x.png", "hyperschedule.length: got 0"),
    (
        "draw hyperschedule --kind quenched --out {work}/x.txt",
        "out: got '{work}/x.txt'; allowed: a file name ending in",
    ),
    ("draw hyperschedule --kind quenched --out {work}/x.png --config.data.length=4", "goes with --config FILE"),
    ("draw hyperschedule --config {quick} --width 4 --out {work}/x.png", "--width: goes with --kind"),
    ("prepare --config {quick} --data {empty} --out {work}", "data.path: got '{empty}', but it is empty"),
    ("prepare --config {quick} --data= --out {work}", "data.path: got ''"),
    ("prepare --config {quick} --out {tmp}", "out: got '{tmp}'; allowed: a new or empty folder"),
    ("bench train --repeats 0", "--repeats: got 0; allowed: at least 1"),
    ("bench train --config.training.batch=0", "training.batch: got 0"),
    ("bench train --vocabulary 0", "model.num_tokens: got 0"),
    ("bench kill --times 0", f"--times: got 0; {POSITIVE}"),
    ("bench sample --batch 4 0", "--batch: got 0; allowed: at least 1"),
    ("bench sample --kind slid", "hyperschedule.kind: got 'slid'"),
    ("bench sample --width 300", "hyperschedule.width: got 300; allowed: a whole number from 1 to 256"),
]


@pytest.fixture
def names(tmp_path, smoke_run, small_text):
    """What the rows may name; `work` does not exist."""
    tmp = tmp_path / "there"
    tmp.mkdir()
    (tmp / "empty.txt").write_text(" \n")
    (tmp / "binary.txt").write_bytes(bytes(range(1, 256)))
    paths = {"tmp": tmp, "run": smoke_run, "work": tmp_path / "work", "quick": QUICK}
    paths |= {"empty": tmp / "empty.txt", "binary": tmp / "binary.txt"}
    return paths | {"text": f"--config.data.source=text --config.data.path={small_text}"}


def check(names, capfd, line, says):
    """Status 2, one line that says it, nothing on the standard output, nothing written or changed."""
    state = lambda: {path: path.stat().st_mtime_ns for key in ("run", "tmp") for path in names[key].rglob("*")}
    before = state()
    capfd.readouterr()
    status = main(line.format(**names).split())
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), err
    assert err.startswith("hdlm: ") and len(err.splitlines()) == 1
    assert says.format(**names) in err
    assert state() == before
    assert not names["work"].exists()


def table(rows):
    return pytest.mark.parametrize(("line", "says"), rows, ids=[row[0][-60:] or "nothing" for row in rows])


@table(COMMANDS)
def test_a_command_that_is_none(names, capfd, line, says):
    check(names, capfd, line, says)


@table(TRAIN)
def test_train(names, capfd, line, says):
    given = f"train --config {{quick}} --workdir {{work}} --config.data.prepared={{run}}/data {SLIDE} "
    check(names, capfd, given + line, says)


@table(CORPUS)
@pytest.mark.parametrize("verb", ["train --config {quick} --workdir {work} ", "prepare --config {quick} --out {work} "])
def test_the_corpus(names, capfd, verb, line, says):
    check(names, capfd, verb + line, says)


@table(RUN)
def test_other_verbs(names, capfd, line, says):
    check(names, capfd, line, says)


# ---- run folders that are not whole

READERS = ["evaluate --run {work}", "sample --run {work}"]


@pytest.fixture
def spoiled(names, smoke_run, tmp_path, capfd):
    """(spoil, command, what it says): a spoilt copy of the run is refused by those who read it, and left as it is."""

    def refuse(spoil, line, says):
        folder = Path(shutil.copytree(smoke_run, names["work"]))
        spoil(folder)
        names["tmp"], names["work"] = folder, tmp_path / "nothing"
        check(names, capfd, line.replace("{work}", str(folder)), says)

    return refuse


@pytest.mark.parametrize("line", READERS)
def test_a_run_without_a_checkpoint(spoiled, line):
    says = "allowed: a folder with a checkpoint: run `hdlm train --workdir {tmp}` first"
    spoiled(lambda folder: shutil.rmtree(folder / "checkpoints"), line, says)


@pytest.mark.parametrize("line", READERS)
def test_a_run_whose_checkpoints_are_all_truncated(spoiled, line):
    def truncate(folder):
        for path in folder.glob("checkpoints/*/manifest/manifest.json"):
            path.write_bytes(path.read_bytes()[:1000])

    spoiled(truncate, line, "no checkpoint in {tmp}/checkpoints can be read (6: its manifest is not a JSON object; 4: ")


def test_a_run_with_another_vocabulary(spoiled):
    def change(folder):
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))

    spoiled(change, READERS[1], "tokenizer: the files in {tmp} are not those that were saved there")


def test_a_run_with_another_models_config(spoiled):
    def change(folder):
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"hidden": 16', '"hidden": 32'))

    spoiled(change, READERS[1], "checkpoint {tmp}/checkpoints/6 is of another model")


def test_a_run_whose_config_was_torn(spoiled):
    def change(folder):
        path = folder / "config.json"
        path.write_text(path.read_text()[:100])

    spoiled(change, READERS[0], "{tmp}/config.json: not JSON (line ")
