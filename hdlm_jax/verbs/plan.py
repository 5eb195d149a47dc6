"""Compiles an experiment for a TPU slice that is not here: does it fit, what does it hold, send and compute.

  hdlm plan --config experiments/scale/epsilon.py:130m-v5e --topology v5e:4x4
  hdlm plan --config experiments/scale/epsilon.py:8b-v5p --topology v5p:4x8x8 --mesh 4,64,1 --json plan.json
  hdlm plan --config experiments/scale/epsilon.py:130m-v6e --topology v6e:16x16 --slices 2 --mesh 32,16,1
  hdlm plan --config experiments/quickstart.py --topology v5e:2x2 --what sample

Needs libtpu (pip install 'hdlm_jax[launch]') and minutes, but no TPU. Generations: v4, v5e, v5p, v6e, tpu7x.
"""

import json

from hdlm_jax import config as configs
from hdlm_jax.verbs import joining


def add_arguments(parser):
    """The verb's flags."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the experiment")
    parser.add_argument("--topology", required=True, metavar="GEN:SHAPE", help="a slice, e.g. v5e:4x4 or v5p:4x4x8")
    parser.add_argument("--mesh", metavar="D,F,T", help="data,fsdp,tensor (default: the experiment's mesh)")
    parser.add_argument("--slices", type=int, default=1, help="so many slices, joined along data (default: 1)")
    parser.add_argument("--what", default="train", help="'train' (default) or 'sample'")
    parser.add_argument("--vocabulary", type=int, help="ordinary tokens (default: the experiment's tokenizer)")
    parser.add_argument("--json", metavar="FILE", help="also write all of it here")


def run(args) -> int:
    """Plans, prints, and writes JSON where asked to; 1 if it does not fit."""
    import os

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiler's slice is no device of this machine
    from hdlm_jax import files
    from hdlm_jax.planning import plan

    config = configs.load(args.config, args.overrides)
    configs.require(args.slices >= 1, "--slices", args.slices, "a positive integer")
    own = ",".join(str(config.mesh[axis]) for axis in ("data", "fsdp", "tensor"))
    sizes = joining.mesh_sizes("--mesh", args.mesh or own)
    if args.vocabulary is not None:
        configs.require(args.vocabulary >= 1, "--vocabulary", args.vocabulary, "a positive integer")
    found = plan.plan(config, args.topology, sizes, args.slices, args.what, args.vocabulary)
    print(plan.table(found))
    if args.json:
        about = {"versions": plan.versions(), **found}
        files.write_whole(files.place(args.json, "--json"), json.dumps(about, indent=2) + "\n")
    return 0 if found["fits"] else 1
