"""`hdlm VERB ...`, the same as `python -m hdlm_jax VERB ...`."""

import argparse
import glob
import importlib
import importlib.util
import keyword
import os
import sys
from collections.abc import Sequence

from hdlm_jax.errors import UserError, unknown

VERBS = {
    "prepare": "tokenise a corpus once into fixed windows",
    "train": "train an experiment; the same command again resumes it",
    "evaluate": "the bound on held-out or any text, in nats, perplexity and bits per byte",
    "diagnose": "what a run makes of its context, its confidence and wrong tokens; what its texts are like",
    "sample": "generate texts from a run",
    "import": "make a run folder of a published checkpoint",
    "export": "write a run's weights in another form",
    "plan": "compile an experiment for a TPU slice that is not here: does it fit, what does it send",
    "draw": "pictures: hyperschedules, noise, who sees whom, losses, quality; a generation to step through",
    "bench": "measure training or sampling speed on this machine",
}
DESCRIPTION = """Language models on the whole line between autoregression and diffusion, in JAX.

  hdlm train --config experiments/quickstart.py --workdir runs/quickstart
  hdlm evaluate --run runs/quickstart
  hdlm sample --run runs/quickstart --prompt "Return " --num 4

`hdlm VERB --help` explains a verb. Any field of an experiment can be set on the command line of the
verbs that take --config: --config.model.hidden=128"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status: 0, or 2 after bad input (one line on the standard error)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _look_for_no_tpu_in_vain()
    try:
        args = _parse(arguments)
        return args.module.run(args) or 0
    except UserError as error:
        print(f"hdlm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (head, say) went away
        return 0


def _look_for_no_tpu_in_vain() -> None:
    """Takes the CPU at once on a machine without an accelerator where libtpu is installed, as `hdlm plan` needs it.

    JAX would search for TPUs there for some seconds, with warnings. JAX_PLATFORMS decides where it is set.
    """
    devices = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
    if importlib.util.find_spec("libtpu") and not any(map(glob.glob, devices)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are bad input like any other: one line."""

    def error(self, message: str):
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parse(arguments: list[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="hdlm", description=DESCRIPTION, formatter_class=kind)
    from hdlm_jax import __version__

    parser.add_argument("--version", action="version", version=f"hdlm_jax {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", dest="verb")
    asked = next((a for a in arguments if not a.startswith("-")), None)
    if asked is not None and asked not in VERBS:
        raise unknown("VERB", asked, VERBS)
    for name, summary in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary, formatter_class=kind)
        if name == asked:  # a verb's imports are heavy: only those of the one asked for
            module = importlib.import_module(f"hdlm_jax.verbs.{name}{'_' * keyword.iskeyword(name)}")
            sub.description = module.__doc__
            module.add_arguments(sub)
            sub.set_defaults(module=module)
    args, rest = parser.parse_known_args(arguments)
    if args.verb is None:
        parser.error(f"no VERB given; allowed: {', '.join(VERBS)}")
    args.overrides = _overrides(rest, hasattr(args, "config"), asked)
    return args


def _overrides(rest: list[str], takes_config: bool, verb: str) -> dict[str, str]:
    """{"model.hidden": "128"} from ["--config.model.hidden=128"], also with a space for the equals sign."""
    found, i = {}, 0
    while i < len(rest):
        name, equals, value = rest[i].partition("=")
        if not takes_config or not name.startswith("--config."):
            raise UserError(f"{rest[i]}: no such argument; see `hdlm {verb} --help`")
        if not equals:
            i += 1
            if i == len(rest):
                raise UserError(f"{name}: no value given")
            value = rest[i]
        found[name.removeprefix("--config.")] = value
        i += 1
    return found


if __name__ == "__main__":
    sys.exit(main())
