"""Trains an experiment in a run folder; the same command again resumes it.

  hdlm train --config experiments/quickstart.py --workdir runs/quickstart
  hdlm train --config experiments/quickstart.py:smoke --workdir /tmp/smoke
  hdlm train --config experiments/quickstart.py --workdir runs/wide --config.model.hidden=256
  hdlm train --init runs/published --workdir runs/finetuned --config.data.source=text --config.data.path='books/*.txt'

The folder holds config.json, env.json, tokenizer files, metrics.jsonl, TensorBoard events, checkpoints/
and samples/. Ctrl-C (or SIGTERM) finishes the step, saves and exits.
"""

from hdlm_jax import config as configs


def add_arguments(parser):
    """The verb's flags."""
    experiment = parser.add_mutually_exclusive_group(required=True)
    experiment.add_argument("--config", metavar="FILE[:ARG]", help="the experiment, e.g. x.py or x.py:smoke")
    weights = "or a run: its experiment, tokenizer and weights (with --config: --config.training.initial=RUN)"
    experiment.add_argument("--init", metavar="RUN", help=weights)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run folder")


def run(args) -> int:
    """Trains to the end, or to a signal."""
    from hdlm_jax.training import train

    if args.init is None:
        return train.train(configs.load(args.config, args.overrides), args.workdir)
    from pathlib import Path

    from hdlm_jax.training import run_folder

    config = run_folder.read_config(Path(args.init))
    changes = {"training.initial": args.init, "data.tokenizer": args.init, **args.overrides}
    return train.train(configs.override(config, changes), args.workdir)
