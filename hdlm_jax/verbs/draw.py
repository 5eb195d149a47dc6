"""Pictures as PNG, SVG or PDF, and a generation as an HTML page to step through.

  hdlm draw hyperschedule --config experiments/quickstart.py --out hyperschedule.png
  hdlm draw hyperschedule --kind slide --length 24 --width 8 --rate 2 --style bars --out slide.png
  hdlm draw gallery --out gallery.png
  hdlm draw visibility --kind slide --length 48 --width 8 --rate 1 --out masks.png
  hdlm draw noise --out noise.png
  hdlm draw kernels --tokens 6 --out kernels.png
  hdlm draw loss --run runs/quickstart --out loss.png
  hdlm draw trajectory --run runs/quickstart --prompt "Return " --sampler acs --eta 0.5 --out trajectory.html
  hdlm draw corrections --run runs/quickstart --sampler acs --eta 0.5 --num 16 --out corrections.png
  hdlm draw quality --json samplers.json --out steps.png
  hdlm draw quality --json samplers.json --against entropy --out frontier.png
  hdlm draw laws --out laws.png
  hdlm draw calibration --json calibration.json --out calibration.png

A hyperschedule is that of an experiment (--config) or one by name (--kind). quality reads what `hdlm bench samplers
--out` wrote, calibration what `hdlm diagnose calibration --out` wrote.
"""

from hdlm_jax import config as configs
from hdlm_jax.errors import UserError, one_of, require
from hdlm_jax.verbs import sample

FIELDS = ("length", "width", "rate", "block", "steps")
LENGTH = 64


def add_arguments(parser):
    """The verb's flags."""
    kinds = parser.add_subparsers(metavar="PICTURE", required=True)
    for name, (summary, arguments, draw) in PICTURES.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        kind.set_defaults(draw=draw)
        arguments(kind)
        kind.add_argument("--out", required=True, metavar="FILE", help="file to write")


def run(args) -> int:
    """Draws and saves."""
    from hdlm_jax.visual import figures, trajectory_html

    kind = trajectory_html if args.draw is _trajectory else figures
    out = kind.checked(args.out)  # before the work
    kind.save(args.draw(args), out)
    print(f"written to {args.out}")
    return 0


def _one_arguments(kind):
    kind.add_argument("--config", metavar="FILE[:ARG]", help="the hyperschedule of an experiment")
    kind.add_argument("--kind", help="or one by name: quenched, flat, block, slide, block_slide, ar_diffusion")
    kind.add_argument("--length", type=int, help=f"positions (default: {LENGTH})")
    kind.add_argument("--width", type=int, help="window rows")
    kind.add_argument("--rate", help="tokens settled per call, '2' or '3/2'")
    kind.add_argument("--block", type=int, help="block_slide: tokens in which the slide restarts")
    kind.add_argument("--steps", type=int, help="flat, ar_diffusion: generation steps")


def _hyperschedule_arguments(kind):
    _one_arguments(kind)
    kind.add_argument("--style", default="heat", help="'heat' (default), a map, or 'bars' in space")


def _hyperschedule(args):
    from hdlm_jax.visual import figures

    return figures.hyperschedule(_chosen(args), style=args.style)


def _gallery_arguments(kind):
    kind.add_argument("--length", type=int, default=24, help="positions (default: 24)")


def _gallery(args):
    from hdlm_jax.visual import gallery

    return gallery.gallery(args.length)


def _visibility_arguments(kind):
    _one_arguments(kind)
    kind.add_argument("--shifted", action="store_true", help="rows hold the token before the one they predict")
    kind.add_argument("--step", type=int, help="generation step shown (default: the middle one)")


def _visibility(args):
    from hdlm_jax.visual import masks

    figure = masks.visibility_masks(_chosen(args), args.shifted, args.step)
    print(figure.get_suptitle())
    return figure


def _chosen(args):
    from hdlm_jax.diffusion import hyperschedules
    from hdlm_jax.models import parts

    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    named = [flag for flag, value in (("--config", args.config), ("--kind", args.kind)) if value is not None]
    require(len(named) == 1, "--config or --kind", named or None, "one of them")
    if args.kind is None:
        for name in fields:
            field = "data.length" if name == "length" else f"hyperschedule.{name}"
            raise UserError(f"--{name}: goes with --kind; of an experiment set --config.{field}=VALUE")
        config = configs.load(args.config, args.overrides)
        return parts.build_hyperschedule(config, config.data.length)
    for name in args.overrides:
        raise UserError(f"--config.{name}: goes with --config FILE, not with --kind")
    return hyperschedules.build(args.kind, **{"length": LENGTH, **fields})


def _noise_arguments(kind):
    kind.add_argument(
        "--kind", nargs="+", metavar="KIND", help="builders that need no fields (default: all, with fields)"
    )


def _noise(args):
    from hdlm_jax.diffusion import noise_schedules
    from hdlm_jax.visual import kernels

    return kernels.noise(args.kind and [noise_schedules.build(kind) for kind in args.kind])


def _kernels_arguments(kind):
    kind.add_argument("--tokens", type=int, default=6, help="ordinary tokens (default: 6)")


def _kernels(args):
    from hdlm_jax.visual import kernels

    return kernels.kernels(args.tokens)


def _loss_arguments(kind):
    kind.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")


def _loss(args):
    import json

    from hdlm_jax import files
    from hdlm_jax.training import metrics, run_folder
    from hdlm_jax.visual import figures

    folder = files.place(args.folder)
    config = run_folder.read_config(folder)
    manifest = files.place(config.data.prepared or folder / "data") / "manifest.json"
    baselines = {}
    if files.is_file(manifest):  # the data may have been removed since
        baselines["unigram byte model"] = json.loads(files.read_text(manifest))["unigram_bits_per_byte"]
    return figures.loss_curve(metrics.read(folder), baselines, title=str(folder))


def _trajectory_arguments(kind):
    kind.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
    kind.add_argument("--weights", default="ema", help="'ema' (default) or 'raw'")
    kind.add_argument("--prompt", help="the text begins with this")
    kind.add_argument("--length", type=int, help="tokens in all, prompt included (default: the trained length)")
    kind.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    kind.add_argument("--sampler", help="by name (default: the experiment's)")
    kind.add_argument("--hyperschedule", help="by name (default: the experiment's)")
    for name, (of, words) in (sample.DIALS | sample.HYPERSCHEDULE).items():
        kind.add_argument(f"--{name.replace('_', '-')}", type=of, help=words)


def _corrections_arguments(kind):
    _trajectory_arguments(kind)
    kind.add_argument("--num", type=int, default=8, help="texts (default: 8)")


def _trajectory(args):
    from hdlm_jax.visual import token_texts, trajectory_html

    out, title = _recorded(args, 1)
    return trajectory_html.html(out.trajectory, token_texts.token_texts(out.tokenizer), title=title)


def _corrections(args):
    from hdlm_jax.visual import corrections

    out, title = _recorded(args, args.num)
    return corrections.corrections(out.trajectory, f"{title}\n{out.hyperschedule.describe()}")


def _recorded(args, num: int):
    """A recorded generation, and a title for it."""
    from hdlm_jax import lm

    model = lm.load(args.folder, args.weights)
    names = (*sample.DIALS, *sample.HYPERSCHEDULE, "length", "hyperschedule", "sampler")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    out = model.generate(args.prompt, num_samples=num, seed=args.seed, record=True, **given)
    dials = "".join(f", {name} {given[name]}" for name in sample.DIALS if name in given)
    return out, f"{args.folder}, step {model.step}: {args.sampler or model.config.sampler.kind}{dials}"


def _quality_arguments(kind):
    kind.add_argument("--json", required=True, metavar="FILE", help="written by `hdlm bench samplers --out`")
    kind.add_argument("--against", default="calls", help="'calls' (default), with the knee, or 'entropy', the frontier")
    kind.add_argument("--value", help="what to draw against calls (default: the judge's nats per token)")


def _quality(args):
    from hdlm_jax.visual import quality_figures

    rows = _rows(args.json)
    if one_of("--against", args.against, ("calls", "entropy")) == "entropy":
        require(args.value is None, "--value", args.value, "nothing with --against entropy")
        return quality_figures.entropy_quality(rows)
    return quality_figures.steps_quality(rows, args.value or quality_figures.NATS)


def _calibration_arguments(kind):
    kind.add_argument("--json", required=True, metavar="FILE", help="written by `hdlm diagnose calibration --out`")


def _calibration(args):
    from hdlm_jax.visual import quality_figures

    return quality_figures.calibration(_rows(args.json))


def _rows(path: str) -> list[dict]:
    """The rows of a file that a measuring verb wrote, or of one that holds them alone."""
    import json

    from hdlm_jax import files

    allowed = "a JSON file that holds rows"
    try:
        read = json.loads(files.read_text(files.place(path, "--json")))
    except (OSError, ValueError) as error:
        raise UserError(f"--json: cannot read {path!r}: {files.reason(error)}; allowed: {allowed}") from error
    rows = read.get("rows") if isinstance(read, dict) else read
    require(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), "--json", path, allowed)
    return rows


def _laws_arguments(kind):
    kind.add_argument("--samples", type=int, default=16_384, help="texts of each sampler (default: 16384)")


def _laws(args):
    """Takes a few minutes: every sampler is run, with a perfect network, over tiny texts."""
    from hdlm_jax.benchmarks import laws
    from hdlm_jax.visual import sampler_laws

    require(args.samples >= 1, "--samples", args.samples, "a positive number of texts")
    rows = laws.measure(samples=args.samples)
    title = f"Samplers with a perfect network: how far the law of {args.samples:,} texts is from the data's"
    return sampler_laws.total_variation(rows, title)


PICTURES = {
    "hyperschedule": ("noise levels by step and position", _hyperschedule_arguments, _hyperschedule),
    "gallery": ("every builder of hyperschedules side by side", _gallery_arguments, _gallery),
    "visibility": ("who sees whom in training and generation", _visibility_arguments, _visibility),
    "noise": ("noise schedules and their slopes", _noise_arguments, _noise),
    "kernels": ("the laws of every noising process on a few tokens", _kernels_arguments, _kernels),
    "loss": ("training and held-out curves of a run", _loss_arguments, _loss),
    "trajectory": ("a generation as an HTML page to step through", _trajectory_arguments, _trajectory),
    "corrections": ("tokens corrected at each step of a generation", _corrections_arguments, _corrections),
    "quality": ("quality against calls with the knee, or against entropy", _quality_arguments, _quality),
    "laws": ("how far every sampler's law is from the data's, by calls", _laws_arguments, _laws),
    "calibration": ("how often tokens are right against their probability", _calibration_arguments, _calibration),
}
