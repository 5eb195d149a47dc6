"""Writes a run's weights in another form, as a new folder.

  hdlm export runs/quickstart exported/quickstart
  hdlm export runs/quickstart exported/raw --format safetensors --weights raw
  hdlm export runs/quickstart exported/torch --format huggingface
  hdlm export runs/quickstart exported/programs --format stablehlo
  hdlm export runs/published exported/published --format published

safetensors  our own layout, which `hdlm sample --run` and `hdlm_jax.load` open
huggingface  PyTorch files of the network and its sampler, weights, tokenizer, settings and a model card, for
             transformers' AutoModel.from_pretrained(OUT, trust_remote_code=True)
stablehlo    our own layout, and the denoiser and the sampler as programs for CPU, GPU and TPU that need jax alone;
             functions.json says what they take
published    the layout of the authors' checkpoints; an imported one comes back bit for bit
"""


def add_arguments(parser):
    """The verb's flags."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    form = "'safetensors' (default), 'huggingface', 'stablehlo' or 'published': see above"
    parser.add_argument("--format", default="safetensors", help=form)
    parser.add_argument("--weights", default="ema", help="'ema' (default) or 'raw'")


def run(args) -> int:
    """Exports and lists what was written."""
    from pathlib import Path

    from hdlm_jax import lm
    from hdlm_jax.errors import choose
    from hdlm_jax.interop import export

    choose("--format", args.format, export.FORMATS)
    lm.load(args.folder, args.weights).export(args.out, args.format)
    for path in sorted(Path(args.out).rglob("*")):
        if path.is_file():
            print(f"{path} ({path.stat().st_size:,} bytes)")
    return 0
