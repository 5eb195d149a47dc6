"""Trains an experiment in a run folder; the same command again resumes it.

  hdlm train --config experiments/quickstart.py --workdir runs/quickstart
  hdlm train --config experiments/quickstart.py:smoke --workdir /tmp/smoke
  hdlm train --config experiments/quickstart.py --workdir runs/wide --config.model.hidden=256
  hdlm train --init runs/published --workdir runs/finetuned --config.data.source=text --config.data.path='books/*.txt'

The folder holds config.json, env.json, tokenizer files, metrics.jsonl, TensorBoard events, checkpoints/,
samples/ and hosts/ (a heartbeat of each process). Ctrl-C (or SIGTERM) finishes the step, saves and exits.

On several hosts, start the same command once on each, with a --workdir that they share. A TPU slice, SLURM and
Open MPI are recognised; anywhere else name a coordinator:
  hdlm train --config C --workdir DIR --coordinator host0:1234 --num-processes 2 --process-id 0   (1 on the other)
"""

from hdlm_jax import config as configs
from hdlm_jax.verbs import joining


def add_arguments(parser):
    """The verb's flags."""
    experiment = parser.add_mutually_exclusive_group(required=True)
    experiment.add_argument("--config", metavar="FILE[:ARG]", help="the experiment, e.g. x.py or x.py:smoke")
    weights = "or a run: its experiment, tokenizer and weights (with --config: --config.training.initial=RUN)"
    experiment.add_argument("--init", metavar="RUN", help=weights)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run folder")
    profile = "a profiler trace of COUNT steps from step FIRST on, into the run folder's profile/"
    parser.add_argument("--profile", default="0:0", metavar="FIRST:COUNT", help=profile)
    joining.add_arguments(parser)


def run(args) -> int:
    """Trains to the end, or to a signal."""
    from hdlm_jax.training import compilation

    profile, config = _profile(args.profile), _config(args)
    with joining.joined(args):
        from hdlm_jax.training import train

        compilation.keep()
        return train.train(config, args.workdir, profile)


def _config(args):
    """The experiment, or that of the run to start from."""
    if args.init is None:
        return configs.load(args.config, args.overrides)
    from hdlm_jax.training import run_folder

    config = run_folder.read_config(args.init)
    changes = {"training.initial": args.init, "data.tokenizer": args.init, **args.overrides}
    return configs.override(config, changes)


def _profile(text: str) -> tuple[int, int]:
    """(first step, how many) of --profile."""
    parts = text.split(":")
    configs.require(len(parts) == 2 and all(map(str.isdigit, parts)), "--profile", text, "FIRST:COUNT, as 10:3")
    return int(parts[0]), int(parts[1])
