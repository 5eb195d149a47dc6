"""Generates texts from a run; they go to the terminal and to the run's samples/ folder.

  hdlm sample --run runs/quickstart --num 4
  hdlm sample --run runs/quickstart --prompt "Return the " --sampler acs --eta 0.5 --temperature 0.8
  hdlm sample --run runs/quickstart --hyperschedule slide --width 8 --rate 1 --live
  hdlm sample --run runs/mdlm --prompt "Return the " --fixed "40= of the list." --sampler confidence
  hdlm sample --run runs/quickstart --prompts prompts.txt --stop

What no flag sets is as in the run's experiment.
"""

import json
import sys
import time
from pathlib import Path

from hdlm_jax.errors import require

# Dials of samplers: the flag, its type, its help. They reach `generate` under the same names.
DIALS = {
    "eta": (float, "acs: strength of the correction; remdm: most of a token's chance to be masked; in [0, 1]"),
    "rounding": (str, "confidence, margin, entropy: tokens per call rounded 'up' or 'down'"),
    "order_temperature": (float, "confidence, margin, entropy: noise on the order; 0 takes the best"),
    "threshold": (float, "threshold: probability from which on a token is committed"),
    "factor": (float, "factor: how many tokens are committed together; greedy ones are exact at 1"),
    "t_switch": (float, "remdm_switch: noise fraction from which on tokens are masked again"),
    "t_on": (float, "remdm_loop: noise fraction at which the loop begins"),
    "t_off": (float, "remdm_loop: noise fraction at which the loop ends"),
    "alpha_on": (float, "remdm_loop: survival in the loop"),
    "temperature": (float, "of the network's scores; 0 is greedy"),
    "top_p": (float, "keep the fewest tokens whose mass reaches this"),
    "top_k": (int, "keep so many tokens; 0 is off"),
    "repetition_penalty": (float, "divides the probability of tokens that the text holds; 1 is off"),
    "guidance": (float, "classifier-free guidance by what is given (full models); 0 is off"),
    "cache_dtype": (str, "of cached keys and values: 'float32' or 'bfloat16'"),
}
HYPERSCHEDULE = {
    "steps": (int, "flat: steps, a model call each at most"),
    "width": (int, "window rows"),
    "rate": (str, "tokens settled per call, '2' or '3/2'"),
    "block": (int, "block_slide: tokens in which the slide restarts"),
}


def add_arguments(parser):
    """The verb's flags."""
    parser.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
    parser.add_argument("--num", type=int, default=1, help="texts (default: 1)")
    parser.add_argument("--prompt", help="the texts begin with this")
    parser.add_argument("--prompts", metavar="FILE", help="one text for each line of a UTF-8 file, which begins it")
    parser.add_argument(
        "--fixed",
        action="append",
        metavar="POSITION=TEXT",
        help="text that stands at a token position; what lies between is filled in (may be given again)",
    )
    parser.add_argument("--length", type=int, help="tokens in all, prompt included (default: the trained length)")
    parser.add_argument("--stop", action="store_true", help="texts end at their first end of text")
    parser.add_argument("--forbid", metavar="TEXT", help="the tokens of this text are never drawn")
    parser.add_argument(
        "--self-correct", action="store_true", help="then replace tokens by surer ones, one at a time (full models)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same texts (default: 0)")
    parser.add_argument("--weights", default="ema", help="'ema' (default) or 'raw'")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write (default: a new one in the run's samples/)")
    parser.add_argument("--live", action="store_true", help="show one text while it is generated")
    parser.add_argument("--delay", type=float, default=0.05, help="--live: seconds between frames (default: 0.05)")
    sampler = parser.add_argument_group("sampler (default: the experiment's)")
    sampler.add_argument("--sampler", help="by name: an unknown one lists them all")
    hs = parser.add_argument_group("hyperschedule (default: the experiment's)")
    hs.add_argument("--hyperschedule", help="'quenched', 'flat', 'block', 'slide', 'block_slide'")
    for group, dials in ((sampler, DIALS), (hs, HYPERSCHEDULE)):
        for name, (kind, words) in dials.items():
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=words)


def run(args) -> int:
    """Generates, prints and saves."""
    from hdlm_jax import files, lm
    from hdlm_jax.diffusion import fields

    fields.seed("--seed", args.seed)
    require(args.num >= 1, "--num", args.num, "a positive integer")
    one = args.num == 1 and args.prompts is None
    require(one or not args.live, "--live", "several texts", "one text: no --prompts, and --num 1")
    dials = {name: getattr(args, name) for name in (*DIALS, *HYPERSCHEDULE) if getattr(args, name) is not None}
    named = {"hyperschedule": args.hyperschedule, "sampler": args.sampler}
    fixed, prompt = _fixed(args.fixed or []), _prompt(args)
    model = lm.load(args.folder, args.weights)
    common = {"length": args.length, "seed": args.seed, "fixed": fixed, "stop": args.stop, **named, **dials}
    if args.live:
        _live(model, prompt, args, common)
        return 0
    forbid = tuple(int(token) for token in model.tokenizer.encode(args.forbid)) if args.forbid else ()
    out = model.generate(prompt, num_samples=args.num, forbid=forbid, **common)
    for note in out.notes:
        print(f"note: {note}", file=sys.stderr)
    texts = out.texts
    if args.self_correct:
        better = model.correct(out.tokens, seed=args.seed)
        texts = better.texts
        before, after = better.accuracy.mean(0)
        print(f"--- {better.replaced.sum()} tokens replaced, self-accuracy {before:.3f} to {after:.3f}")
    for i, text in enumerate(texts):
        print(f"--- sample {i} ({out.hyperschedule.describe()})\n{text}")
    path = files.place(args.out, "--out") if args.out else _free(files.place(args.folder) / "samples", model.step)
    settings = {
        **dials,
        **named,
        "hyperschedule": repr(out.hyperschedule),
        "seed": args.seed,
        "stop": args.stop,
        "self_correct": args.self_correct,
    }
    record = {"prompt": prompt, "fixed": fixed, "step": model.step, "settings": settings, "calls": out.calls}
    record |= {"lengths": out.lengths.tolist(), "texts": texts}
    files.write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print(f"--- {out.calls} model calls\n--- written to {path}")
    return 0


def _live(model, prompt: str | None, args, common: dict) -> None:
    from hdlm_jax.visual import terminal

    for flag, given in (("--out", args.out), ("--forbid", args.forbid), ("--self-correct", args.self_correct or None)):
        require(given is None, flag, given, "nothing with --live, which only shows a text")
    require(args.delay >= 0, "--delay", args.delay, "a number of seconds, 0 or more")
    shot = terminal.play(model.watch(prompt, **common), model.tokenizer, sys.stdout, args.delay)
    print(f"--- {model.tokenizer.decode(shot.tokens[: shot.length], end_of_text=chr(10))}")


def _prompt(args) -> str | list[str] | None:
    if args.prompts is None:
        return args.prompt
    from hdlm_jax.data.corpora import read_text

    require(args.prompt is None, "--prompts", args.prompts, "no --prompt beside it")
    require(args.num == 1, "--num", args.num, "1 with --prompts: one text for each line")
    lines = read_text(args.prompts, "--prompts").splitlines()
    require(any(lines), "--prompts", args.prompts, "a file with a prompt on at least one line")
    return lines


def _fixed(given: list[str]) -> dict[int, str]:
    fixed = {}
    for text in given:
        position, equals, words = text.partition("=")
        require(
            bool(equals and words) and position.isdecimal(), "--fixed", text, "POSITION=TEXT, as '40= of the list.'"
        )
        require(int(position) not in fixed, "--fixed", text, "each position once")
        fixed[int(position)] = words
    return fixed


def _free(folder: Path, step: int) -> Path:
    """A file name that is not taken, with the time in it."""
    from hdlm_jax import files

    now, count = time.strftime("%Y%m%d-%H%M%S"), 1
    path = folder / f"{now}-step{step}.json"
    while files.is_file(path):
        count += 1
        path = folder / f"{now}-step{step}-{count}.json"
    return path
