"""The bound of a run on its held-out split or on any text file.

  hdlm evaluate --run runs/quickstart
  hdlm evaluate --run runs/quickstart --text book.txt --draws 8 --json
  hdlm evaluate --run runs/quickstart --exact
  hdlm evaluate --run runs/quickstart --eta 0.25
  hdlm evaluate --run runs/8b --mesh 4,64,1

Prints an upper bound of -log p: bits per byte, nats per token and perplexity, with a standard error from
the draws of noise, the hyperschedule it is a bound of, its terms (prior, diffusion, correction, reconstruction),
and the unigram byte model of the same split.

By default each draw shows every window at drawn steps or times. With --exact it shows every step of the
hyperschedule once, so that no step is drawn; noise still is, unless there is none (one level, as in quenched
autoregression: the error is then 0) or a window has at most 4096 noised texts, which are then all taken. Flat at
continuous times has no steps to enumerate. With --eta the bound is that of the chain which adaptive correction
runs at that strength; flat is then taken in sampler.steps steps.
"""

import json

from hdlm_jax.errors import require
from hdlm_jax.verbs import joining


def add_arguments(parser):
    """The verb's flags."""
    parser.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
    parser.add_argument("--text", metavar="FILE", help="a UTF-8 text file, in place of the held-out split")
    parser.add_argument("--draws", type=int, default=4, help="passes over every window, at least 2 (default: 4)")
    parser.add_argument("--batch", type=int, default=32, help="windows per pass (default: 32)")
    parser.add_argument("--windows", type=int, default=0, help="only the first so many windows (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--weights", default="ema", help="'ema' (default) or 'raw'")
    parser.add_argument("--exact", action="store_true", help="take every step once instead of drawing steps")
    parser.add_argument("--eta", type=float, help="bound the chain of adaptive correction at this strength, in [0, 1]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    mesh = "devices data,fsdp,tensor to use together (default: one; all in data where processes are joined)"
    parser.add_argument("--mesh", metavar="D,F,T", help=mesh)
    joining.add_arguments(parser)


def run(args) -> int:
    """Evaluates and prints, once where several processes are joined."""
    from hdlm_jax.diffusion import fields

    fields.seed("--seed", args.seed)
    require(args.batch >= 1, "--batch", args.batch, "a positive integer")
    with joining.joined(args):
        return _evaluate(args)


def _evaluate(args) -> int:
    from pathlib import Path

    from hdlm_jax import lm
    from hdlm_jax.training import distributed

    with distributed.together():
        model = lm.load(args.folder, args.weights, _mesh(args.mesh))
    chain = {"eta": args.eta, "exact": args.exact}
    if args.text is not None:
        bound, unigram = model.perplexity(Path(args.text), args.draws, args.seed, args.batch, **chain), None
    else:
        bound, unigram = model.held_out(args.folder, args.draws, args.seed, args.batch, args.windows, **chain)
    if not distributed.is_writer():
        return 0
    if args.json:
        print(json.dumps({**bound.to_json(), "unigram_bits_per_byte": unigram, "step": model.step}, indent=2))
        return 0
    print(f"{args.text or 'held-out split'} at step {model.step}, weights {args.weights}")
    print(bound)
    terms = (f"{name} {x:.4f} +- {bound.errors[name]:.4f}" for name, x in bound.terms.items())
    print("  terms (nats/token): " + ", ".join(terms))
    if unigram is not None:
        print(f"unigram byte model of the same split: {unigram:.4f} bits/byte ({unigram - bound.bits_per_byte:+.4f})")
    return 0


def _mesh(sizes: str | None):
    """The mesh that was asked for; None for one device alone."""
    import jax
    from ml_collections import ConfigDict

    from hdlm_jax.training import sharding

    if sizes is None and jax.process_count() == 1:
        return None
    data, fsdp, tensor = joining.mesh_sizes("--mesh", sizes or "-1,1,1")
    return sharding.mesh(ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor}))
