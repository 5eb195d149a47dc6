"""Speed and quality on this machine, as a table and JSON; every figure beside a baseline of the same run.

  hdlm bench train
  hdlm bench train --config experiments/quickstart.py
  hdlm bench train --config.model.remat=none --config.training.batch=16 --out bench.json
  hdlm bench sample --kind block --width 16 --rate 2 --length 256 --batch 4
  hdlm bench sample --kind slide --width 16 --rate 1 2 4
  hdlm bench sample --length 256 2048 --batch 8 --alone
  hdlm bench sample --kind flat --steps 256 1024 4096 --batch 1 --config.sampler.kind=ancestral
  hdlm bench variance --run runs/mdlm
  hdlm bench samplers --run runs/epsilon --judge runs/ar --rate 1 2 4 8
  hdlm bench kill --times 20
  hdlm bench checkpoint

`train` and `sample` without --config: hidden 256, 6 blocks, 4 heads, L 256, vocabulary 8192, batch 8, float32,
dropout 0.1; generation uses random weights, for speed does not depend on them. `variance` draws the noise of one batch
of a run's held-out windows again and again. `samplers` compares texts of a run: corrected is the share of tokens that
changed after they were first drawn (by corrections, or in an exact last step), entropy that of the tokens within a
text (nats), and the judge another run, best an autoregressive one. `checkpoint` saves and restores the state of 99M
parameters (1.6 GB) and starts a run of them again.
"""

import itertools
import json
from pathlib import Path

from hdlm_jax import config as configs

STANDARD = {"data.length": 256, "training.batch": 8, "noising.epsilon": 0.01}
PREFIX = {"model.visibility": "prefix", "model.prediction": "shifted"}


def add_arguments(parser):
    """The verb's flags."""
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    for name, (summary, arguments, measure) in KINDS.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        kind.set_defaults(measure=measure)
        arguments(kind)
        kind.add_argument("--out", metavar="FILE", help="also write JSON here")


def run(args) -> int:
    """Measures, prints a table, and writes JSON where asked to."""
    import jax

    from hdlm_jax import files
    from hdlm_jax.benchmarks.timing import table
    from hdlm_jax.training.run_folder import environment

    rows, note = args.measure(args)
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}; {note}")
    print(table(rows))
    if args.out:
        about = {"environment": environment(), "rows": rows}
        files.write_whole(files.place(args.out, "--out"), json.dumps(about, indent=2) + "\n")
    return 0


def _config(args, **fixed):
    given = configs.load(args.config) if args.config else configs.override(configs.default(), STANDARD)
    return configs.override(given, fixed | args.overrides)


def _at_least(flag: str, given: int, least: int) -> None:
    configs.require(given >= least, flag, given, f"at least {least}")


def _train_arguments(kind):
    kind.add_argument("--config", metavar="FILE[:ARG]", help="an experiment (default: the standard sizes)")
    kind.add_argument("--vocabulary", type=int, default=8192, help="ordinary tokens (default: 8192)")
    kind.add_argument("--repeats", type=int, default=5, help="timed calls, the median counts (default: 5)")


def _train(args) -> tuple[list[dict], str]:
    from hdlm_jax.benchmarks import train

    _at_least("--repeats", args.repeats, 1)
    return train.measure(_config(args), args.vocabulary, args.repeats), f"medians of {args.repeats}"


def _sample_arguments(kind):
    _train_arguments(kind)
    kind.add_argument("--kind", default="block", help="quenched, flat, block or slide (default: block)")
    kind.add_argument("--width", type=int, nargs="+", default=[16], help="window rows (default: 16)")
    kind.add_argument("--rate", nargs="+", default=["2"], help="tokens settled per call (default: 2)")
    kind.add_argument("--steps", type=int, nargs="+", default=[128], help="of flat (default: 128)")
    kind.add_argument("--length", type=int, nargs="+", default=[256], help="tokens per text (default: 256)")
    kind.add_argument("--batch", type=int, nargs="+", default=[4], help="texts at once (default: 4)")
    kind.add_argument("--alone", action="store_true", help="without the baselines, which long texts make slow")


def _sample(args) -> tuple[list[dict], str]:
    from hdlm_jax.benchmarks import sample
    from hdlm_jax.diffusion import hyperschedules

    _at_least("--repeats", args.repeats, 1)
    _at_least("--batch", min(args.batch), 1)
    rows = []
    for length, batch in itertools.product(args.length, args.batch):
        if args.kind in ("quenched", "flat"):
            settings = [{"steps": steps} for steps in (args.steps if args.kind == "flat" else [None])]
        else:
            settings = [{"width": w, "rate": r} for w, r in itertools.product(args.width, args.rate)]
        for fields in settings:
            hs = hyperschedules.build(args.kind, length, **fields)
            window = {"hyperschedule.width": hs.width, "hyperschedule.rate": str(hs.rate)}
            flat = args.kind == "flat"
            trained = {"hyperschedule.kind": "flat"} if flat else {"hyperschedule.kind": "slide", **window, **PREFIX}
            config = _config(args, **{"data.length": length}, **trained)
            rows.append(sample.measure(config, args.vocabulary, hs, batch, args.repeats, args.alone))
    return rows, f"medians of {args.repeats}"


def _variance_arguments(kind):
    kind.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
    kind.add_argument("--batch", type=int, default=16, help="held-out windows (default: 16)")
    kind.add_argument("--draws", type=int, default=128, help="of their noise, for each way (default: 128)")
    kind.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")


def _variance(args) -> tuple[list[dict], str]:
    from hdlm_jax import lm
    from hdlm_jax.benchmarks import variance
    from hdlm_jax.diffusion import fields

    _at_least("--batch", args.batch, 1)
    _at_least("--draws", args.draws, 2)
    seed, model = fields.seed("--seed", args.seed), lm.load(args.folder)
    tokens_BxL, _ = model.held_out_windows(args.folder, args.batch)
    rows = variance.measure(model.parts, model.params, tokens_BxL, args.draws, seed)
    return rows, f"{args.draws} draws of the noise of {len(tokens_BxL)} held-out windows, step {model.step}"


def _samplers_arguments(kind):
    kind.add_argument("--run", dest="folder", required=True, metavar="DIR", help="the run that generates")
    kind.add_argument("--judge", required=True, metavar="DIR", help="a run of the same tokenizer and text length")
    kind.add_argument("--sampler", nargs="+", default=["ancestral", "acs"], help="names (default: ancestral acs)")
    kind.add_argument("--eta", type=float, nargs="+", default=[0.25], help="of acs and acs_published (default: 0.25)")
    kind.add_argument("--rate", nargs="+", default=["1", "2", "4", "8"], help="tokens per call (default: 1 2 4 8)")
    kind.add_argument("--num", type=int, default=64, help="texts of each kind (default: 64)")
    kind.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")


def _samplers(args) -> tuple[list[dict], str]:
    from hdlm_jax import lm
    from hdlm_jax.benchmarks import samplers
    from hdlm_jax.diffusion import fields

    _at_least("--num", args.num, 2)
    chosen = []
    for name in args.sampler:
        dials = [{"eta": eta} for eta in args.eta] if name in ("acs", "acs_published") else [{}]
        chosen += [(name, of) for of in dials]
    model, judge = lm.load(args.folder), lm.load(args.judge)
    rows = samplers.measure(model, judge, chosen, args.rate, args.num, fields.seed("--seed", args.seed))
    return rows, f"{args.num} texts of {model.parts.model.length} tokens, {model.parts.process.name}, step {model.step}"


def _kill_arguments(kind):
    kind.add_argument("--times", type=int, default=5, help="kills (default: 5)")
    kind.add_argument("--seed", type=int, default=0, help="of their moments (default: 0)")
    kind.add_argument("--config", metavar="FILE[:ARG]", default="experiments/quickstart.py:smoke", help="an experiment")


def _kill(args) -> tuple[list[dict], str]:
    import tempfile

    from hdlm_jax.benchmarks import kill

    sizes = {"steps": 60, "log_every": 1, "checkpoint_every": 4, "evaluate_every": 20}
    config = _config(args, **{f"training.{name}": value for name, value in sizes.items()})
    with tempfile.TemporaryDirectory(prefix="hdlm-kill-") as folder:
        return [kill.measure(config, Path(folder) / "runs", args.times, args.seed)], f"seed {args.seed}"


def _checkpoint_arguments(kind):
    kind.add_argument("--config", metavar="FILE[:ARG]", help="an experiment (default: 99M parameters)")
    kind.add_argument("--repeats", type=int, default=5, help="saves (default: 5)")
    kind.add_argument("--folder", metavar="DIR", help="where to write (default: the folder for temporary files)")


def _checkpoint(args) -> tuple[list[dict], str]:
    import tempfile

    from hdlm_jax.benchmarks import checkpoint
    from hdlm_jax.training import compilation

    _at_least("--repeats", args.repeats, 1)
    config = _config(args, **({} if args.config else checkpoint.SIZE))
    compilation.keep()
    with tempfile.TemporaryDirectory(prefix="hdlm-checkpoint-", dir=args.folder) as folder:
        return [checkpoint.measure(config, Path(folder), args.repeats)], f"{args.repeats} saves; seconds"


KINDS = {
    "train": ("a training step, against its matrix products alone", _train_arguments, _train),
    "sample": ("generation, against recomputing all rows and against quenched AR", _sample_arguments, _sample),
    "variance": (
        "the bound's variance for each way to draw the noise, against independent draws",
        _variance_arguments,
        _variance,
    ),
    "samplers": (
        "samplers at several rates: corrections, entropy, perplexity under a judge",
        _samplers_arguments,
        _samplers,
    ),
    "kill": ("resume: training killed at random moments, against a straight run", _kill_arguments, _kill),
    "checkpoint": ("what saves hold up, restores, and a restart's first step", _checkpoint_arguments, _checkpoint),
}
