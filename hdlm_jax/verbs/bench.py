"""Speed on this machine, as a table and JSON; every figure beside a baseline of the same run.

  hdlm bench train
  hdlm bench train --config experiments/quickstart.py
  hdlm bench train --config.model.remat=none --config.training.batch=16 --out bench.json
  hdlm bench sample --kind block --width 16 --rate 2 --length 256 --batch 4
  hdlm bench sample --kind slide --width 16 --rate 1 2 4
  hdlm bench sample --length 256 2048 --batch 8 --alone
  hdlm bench variance --run runs/mdlm
  hdlm bench kill --times 20

Without --config: hidden 256, 6 blocks, 4 heads, L 256, vocabulary 8192, batch 8, float32, dropout 0.1.
Generation uses random weights: speed does not depend on them. The variance of the bound does: it takes a run, and
draws the noise of one batch of its held-out windows again and again.
"""

import itertools
import json

from hdlm_jax import config as configs

STANDARD = {"data.length": 256, "training.batch": 8, "noising.epsilon": 0.01}
KINDS = {
    "train": "a training step, against its matrix products alone",
    "sample": "generation, against recomputing all rows and against quenched AR",
    "variance": "the bound's variance for each way to draw the noise, against independent draws",
    "kill": "resume, proven: training killed at random moments ends in the same bits as a straight run",
}
PREFIX = {"model.visibility": "prefix", "model.prediction": "shifted"}


def add_arguments(parser):
    """The verb's flags."""
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    parsers = [kinds.add_parser(name, help=text, description=text) for name, text in KINDS.items()]
    train, sample, variance, kill = parsers
    train.set_defaults(measure=_train)
    sample.set_defaults(measure=_sample)
    variance.set_defaults(measure=_variance)
    kill.set_defaults(measure=_kill)
    for kind in (train, sample):
        kind.add_argument("--config", metavar="FILE[:ARG]", help="an experiment (default: the standard sizes)")
        kind.add_argument("--vocabulary", type=int, default=8192, help="ordinary tokens (default: 8192)")
        kind.add_argument("--repeats", type=int, default=5, help="timed calls, the median counts (default: 5)")
    for kind in (train, sample, variance, kill):
        kind.add_argument("--out", metavar="FILE", help="also write JSON here")
    variance.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
    variance.add_argument("--batch", type=int, default=16, help="held-out windows (default: 16)")
    variance.add_argument("--draws", type=int, default=128, help="of their noise, for each way (default: 128)")
    variance.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    kill.add_argument("--times", type=int, default=5, help="kills (default: 5)")
    kill.add_argument("--seed", type=int, default=0, help="of their moments (default: 0)")
    kill.add_argument("--config", metavar="FILE[:ARG]", default="experiments/quickstart.py:smoke", help="an experiment")
    sample.add_argument("--kind", default="block", help="quenched, flat, block or slide (default: block)")
    sample.add_argument("--width", type=int, nargs="+", default=[16], help="window rows (default: 16)")
    sample.add_argument("--rate", nargs="+", default=["2"], help="tokens settled per call (default: 2)")
    sample.add_argument("--length", type=int, nargs="+", default=[256], help="tokens per text (default: 256)")
    sample.add_argument("--batch", type=int, nargs="+", default=[4], help="texts at once (default: 4)")
    sample.add_argument("--alone", action="store_true", help="without the baselines, which long texts make slow")


def run(args) -> int:
    """Measures, prints a table, and writes JSON where asked to."""
    import jax

    from hdlm_jax.benchmarks.timing import table
    from hdlm_jax.training.run_folder import environment, write_whole

    rows, note = args.measure(args)
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}; {note}")
    print(table(rows))
    if args.out:
        from pathlib import Path

        write_whole(Path(args.out), json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    return 0


def _config(args, **fixed):
    given = configs.load(args.config) if args.config else configs.override(configs.default(), STANDARD)
    return configs.override(given, fixed | args.overrides)


def _medians(args) -> str:
    configs.require(args.repeats >= 1, "--repeats", args.repeats, "a positive integer")
    return f"medians of {args.repeats}"


def _train(args) -> tuple[list[dict], str]:
    from hdlm_jax.benchmarks import train

    note = _medians(args)
    return train.measure(_config(args), args.vocabulary, args.repeats), note


def _variance(args) -> tuple[list[dict], str]:
    from pathlib import Path

    from hdlm_jax import lm
    from hdlm_jax.benchmarks import variance

    configs.require(args.batch >= 1, "--batch", args.batch, "a positive integer")
    configs.require(args.draws >= 2, "--draws", args.draws, "at least 2")
    configs.require(0 <= args.seed < 2**32, "--seed", args.seed, f"a whole number from 0 to {2**32 - 1}")
    model = lm.load(args.folder)
    tokens_BxL, _ = model.held_out_windows(Path(args.folder), args.batch)
    rows = variance.measure(model.parts, model.params, tokens_BxL, args.draws, args.seed)
    return rows, f"{args.draws} draws of the noise of {len(tokens_BxL)} held-out windows, step {model.step}"


def _sample(args) -> tuple[list[dict], str]:
    from hdlm_jax.benchmarks import sample
    from hdlm_jax.diffusion import hyperschedules

    note = _medians(args)
    for batch in args.batch:
        configs.require(batch >= 1, "--batch", batch, "a positive integer")
    rows = []
    for length, batch in itertools.product(args.length, args.batch):
        if args.kind in ("quenched", "flat"):
            settings = [{"steps": None} if args.kind == "quenched" else {"steps": 128}]
        else:
            settings = [{"width": w, "rate": r} for w, r in itertools.product(args.width, args.rate)]
        for fields in settings:
            hs = hyperschedules.build(args.kind, length, **fields)
            window = {"hyperschedule.width": hs.width, "hyperschedule.rate": str(hs.rate)}
            trained = (
                {"hyperschedule.kind": "flat"} if args.kind == "flat" else {"hyperschedule.kind": "slide", **window}
            )
            shape = {} if args.kind == "flat" else PREFIX
            config = _config(args, **{"data.length": length}, **shape, **trained)
            rows.append(sample.measure(config, args.vocabulary, hs, batch, args.repeats, args.alone))
    return rows, note


def _kill(args) -> tuple[list[dict], str]:
    import tempfile
    from pathlib import Path

    from hdlm_jax.benchmarks import kill

    sizes = {"steps": 60, "log_every": 1, "checkpoint_every": 4, "evaluate_every": 20}
    fields = {f"training.{name}": str(value) for name, value in sizes.items()} | args.overrides
    command = ["train", "--config", args.config, *(f"--config.{name}={value}" for name, value in fields.items())]
    with tempfile.TemporaryDirectory(prefix="hdlm-kill-") as folder:
        return [kill.measure(command, Path(folder) / "runs", args.times, args.seed)], f"seed {args.seed}"
