"""Speed on this machine, as a table and JSON; every figure beside a baseline of the same run.

  hdlm bench train
  hdlm bench train --config experiments/quickstart.py
  hdlm bench train --config.model.remat=none --config.training.batch=16 --out bench.json
  hdlm bench sample --kind block --width 16 --rate 2 --length 256 --batch 4
  hdlm bench sample --kind slide --width 16 --rate 1 2 4 --length 256 1024 2048 --batch 8

Without --config: hidden 256, 6 blocks, 4 heads, L 256, vocabulary 8192, batch 8, float32, dropout 0.1.
Generation uses random weights: speed does not depend on them.
"""

import itertools
import json

from hdlm_jax import config as configs

STANDARD = {"data.length": 256, "training.batch": 8, "noising.epsilon": 0.01}
KINDS = {
    "train": "a training step, against its matrix products alone",
    "sample": "generation, against recomputing all rows and against quenched AR",
}
PREFIX = {"model.visibility": "prefix", "model.prediction": "shifted"}


def add_arguments(parser):
    """The verb's flags."""
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    train, sample = (kinds.add_parser(name, help=text, description=text) for name, text in KINDS.items())
    train.set_defaults(measure=_train)
    sample.set_defaults(measure=_sample)
    for kind in (train, sample):
        kind.add_argument("--config", metavar="FILE[:ARG]", help="an experiment (default: the standard sizes)")
        kind.add_argument("--vocabulary", type=int, default=8192, help="ordinary tokens (default: 8192)")
        kind.add_argument("--repeats", type=int, default=5, help="timed calls, the median counts (default: 5)")
        kind.add_argument("--out", metavar="FILE", help="also write JSON here")
    sample.add_argument("--kind", default="block", help="quenched, flat, block or slide (default: block)")
    sample.add_argument("--width", type=int, nargs="+", default=[16], help="window rows (default: 16)")
    sample.add_argument("--rate", nargs="+", default=["2"], help="tokens settled per call (default: 2)")
    sample.add_argument("--length", type=int, nargs="+", default=[256], help="tokens per text (default: 256)")
    sample.add_argument("--batch", type=int, nargs="+", default=[4], help="texts at once (default: 4)")


def run(args) -> int:
    """Measures, prints a table, and writes JSON where asked to."""
    import jax

    from hdlm_jax.benchmarks.timing import table
    from hdlm_jax.training.run_folder import environment, write_whole

    configs.require(args.repeats >= 1, "--repeats", args.repeats, "a positive integer")
    rows = args.measure(args)
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}; medians of {args.repeats}")
    print(table(rows))
    if args.out:
        from pathlib import Path

        write_whole(Path(args.out), json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    return 0


def _config(args, **fixed):
    given = configs.load(args.config) if args.config else configs.override(configs.default(), STANDARD)
    return configs.override(given, fixed | args.overrides)


def _train(args) -> list[dict]:
    from hdlm_jax.benchmarks import train

    return train.measure(_config(args), args.vocabulary, args.repeats)


def _sample(args) -> list[dict]:
    from hdlm_jax.benchmarks import sample
    from hdlm_jax.diffusion import hyperschedules

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
            rows.append(sample.measure(config, args.vocabulary, hs, batch, args.repeats))
    return rows
