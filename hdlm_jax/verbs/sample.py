"""Generates texts from a run; they go to the terminal and to the run's samples/ folder.

  hdlm sample --run runs/quickstart --num 4
  hdlm sample --run runs/quickstart --prompt "Return the " --sampler acs --eta 0.5 --temperature 0.8
  hdlm sample --run runs/quickstart --hyperschedule slide --width 8 --rate 1

What no flag sets is as in the run's experiment.
"""

import json
import time
from pathlib import Path

from hdlm_jax.errors import require


def add_arguments(parser):
    """The verb's flags."""
    parser.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
    parser.add_argument("--num", type=int, default=1, help="texts (default: 1)")
    parser.add_argument("--prompt", default="", help="the texts begin with this")
    parser.add_argument("--length", type=int, help="tokens in all, prompt included (default: the trained length)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default: 0)")
    parser.add_argument("--weights", default="ema", help="'ema' (default) or 'raw'")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write (default: a new one in the run's samples/)")
    sampler = parser.add_argument_group("sampler (default: the experiment's)")
    sampler.add_argument("--sampler", help="'ancestral', 'analytic', 'euler', 'acs' or 'acs_published'")
    sampler.add_argument("--eta", type=float, help="acs: strength of the correction, in [0, 1]")
    sampler.add_argument("--temperature", type=float, help="of the network's scores; 0 is greedy")
    sampler.add_argument("--top-p", type=float, help="keep the fewest tokens whose mass reaches this")
    sampler.add_argument("--top-k", type=int, help="keep so many tokens; 0 is off")
    sampler.add_argument("--cache-dtype", help="of cached keys and values: 'float32' or 'bfloat16'")
    hs = parser.add_argument_group("hyperschedule (default: the experiment's)")
    hs.add_argument("--hyperschedule", help="'quenched', 'flat', 'block', 'slide', 'block_slide'")
    hs.add_argument("--steps", type=int, help="flat: model calls")
    hs.add_argument("--width", type=int, help="window rows")
    hs.add_argument("--rate", help="tokens settled per call, '2' or '3/2'")
    hs.add_argument("--block", type=int, help="block_slide: tokens in which the slide restarts")


def run(args) -> int:
    """Generates, prints and saves."""
    from hdlm_jax import lm
    from hdlm_jax.diffusion import fields
    from hdlm_jax.training.run_folder import write_whole

    fields.seed("--seed", args.seed)
    require(args.num >= 1, "--num", args.num, "a positive integer")
    names = ("eta", "temperature", "top_p", "top_k", "cache_dtype", "steps", "width", "rate", "block")
    dials = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model = lm.load(args.folder, args.weights)
    out = model.generate(
        args.prompt,
        num_samples=args.num,
        length=args.length,
        seed=args.seed,
        hyperschedule=args.hyperschedule,
        sampler=args.sampler,
        **dials,
    )
    for i, text in enumerate(out.texts):
        print(f"--- sample {i} ({out.hyperschedule.describe()})\n{text}")
    path = _free(Path(args.folder) / "samples", model.step) if args.out is None else Path(args.out)
    settings = {**dials, "hyperschedule": repr(out.hyperschedule), "sampler": args.sampler, "seed": args.seed}
    record = {"prompt": args.prompt, "step": model.step, "settings": settings, "texts": out.texts}
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"--- written to {path}")
    return 0


def _free(folder: Path, step: int) -> Path:
    """A file name that is not taken, with the time in it."""
    now, count = time.strftime("%Y%m%d-%H%M%S"), 1
    path = folder / f"{now}-step{step}.json"
    while path.exists():
        count += 1
        path = folder / f"{now}-step{step}-{count}.json"
    return path
