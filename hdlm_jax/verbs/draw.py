"""Pictures as PNG, SVG or PDF.

hdlm draw hyperschedule --config experiments/quickstart.py --out hyperschedule.png
hdlm draw hyperschedule --kind slide --length 64 --width 16 --rate 2 --out slide.png
hdlm draw loss --run runs/quickstart --out loss.png
"""

from hdlm_jax import config as configs

FIELDS = ("width", "rate", "block", "steps")


def add_arguments(parser):
    """The verb's flags."""
    kinds = parser.add_subparsers(metavar="PICTURE", required=True)
    hs = kinds.add_parser("hyperschedule", help="noise levels by step and position, beside the window")
    hs.add_argument("--config", metavar="FILE[:ARG]", help="the hyperschedule of an experiment")
    hs.add_argument("--kind", help="or one by name: quenched, flat, block, slide, block_slide, ar_diffusion")
    hs.add_argument("--length", type=int, default=64, help="positions (default: 64)")
    hs.add_argument("--width", type=int, help="window rows")
    hs.add_argument("--rate", help="tokens settled per call, '2' or '3/2'")
    hs.add_argument("--block", type=int, help="block_slide: tokens in which the slide restarts")
    hs.add_argument("--steps", type=int, help="flat, ar_diffusion: generation steps")
    hs.set_defaults(picture=_hyperschedule)
    loss = kinds.add_parser("loss", help="training and held-out curves of a run")
    loss.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
    loss.set_defaults(picture=_loss)
    for kind in (hs, loss):
        kind.add_argument("--out", required=True, metavar="FILE", help="file to write")


def run(args) -> int:
    """Draws and saves."""
    from hdlm_jax.visual import figures

    figures.save(args.picture(args, figures), args.out)
    print(f"written to {args.out}")
    return 0


def _hyperschedule(args, figures):
    from hdlm_jax.diffusion import hyperschedules
    from hdlm_jax.models import parts

    configs.require(
        (args.config is None) != (args.kind is None), "--config or --kind", "both or neither", "one of them"
    )
    if args.config is not None:
        config = configs.load(args.config, args.overrides)
        return figures.hyperschedule(parts.build_hyperschedule(config, config.data.length))
    fields = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    return figures.hyperschedule(hyperschedules.build(args.kind, args.length, **fields))


def _loss(args, figures):
    import json
    from pathlib import Path

    from hdlm_jax.training import metrics, run_folder

    folder = Path(args.folder)
    config = run_folder.read_config(folder)
    manifest = Path(config.data.prepared or folder / "data") / "manifest.json"
    unigram = json.loads(manifest.read_text())["unigram_bits_per_byte"]
    return figures.loss_curve(metrics.read(folder), {"unigram byte model": unigram}, title=str(folder))
