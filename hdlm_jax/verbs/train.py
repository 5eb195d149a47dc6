"""Trains an experiment in a run folder; the same command again resumes it.

  hdlm train --config experiments/quickstart.py --workdir runs/quickstart
  hdlm train --config experiments/quickstart.py:smoke --workdir /tmp/smoke
  hdlm train --config experiments/quickstart.py --workdir runs/wide --config.model.hidden=256

The folder holds config.json, env.json, tokenizer files, metrics.jsonl, TensorBoard events, checkpoints/
and samples/. Ctrl-C (or SIGTERM) finishes the step, saves and exits.
"""

from hdlm_jax import config as configs


def add_arguments(parser):
    """The verb's flags."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the experiment, e.g. x.py or x.py:smoke")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run folder")


def run(args) -> int:
    """Trains to the end, or to a signal."""
    from hdlm_jax.training import train

    return train.train(configs.load(args.config, args.overrides), args.workdir)
