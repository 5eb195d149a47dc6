"""Pictures as PNG, SVG or PDF.

  hdlm draw hyperschedule --config experiments/quickstart.py --out hyperschedule.png
  hdlm draw hyperschedule --kind slide --length 64 --width 16 --rate 2 --out slide.png
  hdlm draw visibility --kind slide --length 48 --width 8 --rate 1 --out masks.png
  hdlm draw loss --run runs/quickstart --out loss.png

A hyperschedule is that of an experiment (--config) or one by name (--kind).
"""

from hdlm_jax import config as configs
from hdlm_jax.errors import UserError

FIELDS = ("length", "width", "rate", "block", "steps")
LENGTH = 64
PICTURES = {
    "hyperschedule": "noise levels by step and position, beside the window",
    "visibility": "who sees whom in training and generation",
    "loss": "training and held-out curves of a run",
}


def add_arguments(parser):
    """The verb's flags."""
    kinds = parser.add_subparsers(metavar="PICTURE", required=True)
    hs, masks, loss = (kinds.add_parser(name, help=text, description=text) for name, text in PICTURES.items())
    hs.set_defaults(picture=_hyperschedule)
    masks.add_argument("--shifted", action="store_true", help="rows hold the token before the one they predict")
    masks.add_argument("--step", type=int, help="generation step shown (default: the middle one)")
    masks.set_defaults(picture=_visibility)
    loss.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
    loss.set_defaults(picture=_loss)
    for kind in (hs, masks):
        _add_hyperschedule(kind)
    for kind in (hs, masks, loss):
        kind.add_argument("--out", required=True, metavar="FILE", help="file to write")


def _add_hyperschedule(parser):
    parser.add_argument("--config", metavar="FILE[:ARG]", help="the hyperschedule of an experiment")
    parser.add_argument("--kind", help="or one by name: quenched, flat, block, slide, block_slide, ar_diffusion")
    parser.add_argument("--length", type=int, help=f"positions (default: {LENGTH})")
    parser.add_argument("--width", type=int, help="window rows")
    parser.add_argument("--rate", help="tokens settled per call, '2' or '3/2'")
    parser.add_argument("--block", type=int, help="block_slide: tokens in which the slide restarts")
    parser.add_argument("--steps", type=int, help="flat, ar_diffusion: generation steps")


def run(args) -> int:
    """Draws and saves."""
    from hdlm_jax.visual import figures

    figures.save(args.picture(args, figures), args.out)
    print(f"written to {args.out}")
    return 0


def _hyperschedule(args, figures):
    return figures.hyperschedule(_chosen(args))


def _visibility(args, figures):
    from hdlm_jax.visual import masks

    figure = masks.visibility_masks(_chosen(args), args.shifted, args.step)
    print(figure.get_suptitle())
    return figure


def _chosen(args):
    from hdlm_jax.diffusion import hyperschedules
    from hdlm_jax.models import parts

    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    named = [flag for flag, value in (("--config", args.config), ("--kind", args.kind)) if value is not None]
    configs.require(len(named) == 1, "--config or --kind", named or None, "one of them")
    if args.kind is None:
        for name in fields:
            field = "data.length" if name == "length" else f"hyperschedule.{name}"
            raise UserError(f"--{name}: goes with --kind; of an experiment set --config.{field}=VALUE")
        config = configs.load(args.config, args.overrides)
        return parts.build_hyperschedule(config, config.data.length)
    for name in args.overrides:
        raise UserError(f"--config.{name}: goes with --config FILE, not with --kind")
    return hyperschedules.build(args.kind, **{"length": LENGTH, **fields})


def _loss(args, figures):
    import json
    from pathlib import Path

    from hdlm_jax.training import metrics, run_folder

    folder = Path(args.folder)
    config = run_folder.read_config(folder)
    manifest = Path(config.data.prepared or folder / "data") / "manifest.json"
    baselines = {}
    if manifest.exists():  # the data may have been removed since
        baselines["unigram byte model"] = json.loads(manifest.read_text())["unigram_bits_per_byte"]
    return figures.loss_curve(metrics.read(folder), baselines, title=str(folder))
