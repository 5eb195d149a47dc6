"""Tokenises a corpus once into fixed windows, with its tokenizer and a manifest.

  hdlm prepare --config experiments/quickstart.py --out data/docs
  hdlm prepare --config experiments/quickstart.py --data 'books/*.txt' --out data/books

Train on it with --config.data.prepared=DIR. `hdlm train` prepares small corpora by itself.
"""

from hdlm_jax import config as configs


def add_arguments(parser):
    """The verb's flags."""
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the experiment")
    parser.add_argument("--data", metavar="FILES", help="text files or globs, in place of the experiment's corpus")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")


def run(args) -> int:
    """Prepares the corpus and prints what was written."""
    from hdlm_jax.data import prepare

    config = configs.load(args.config, args.overrides)
    if args.data is not None:
        config = configs.override(config, {"data.source": "text", "data.path": args.data})
    prepared = prepare.prepare(config.data.to_dict(), args.out)
    for name, split in prepared.manifest["splits"].items():
        print(
            f"{name}: {split['documents']:,} documents, {split['windows']:,} windows of {config.data.length} tokens,"
            f" {split['bytes']:,} bytes of text ({split['dropped_tokens']} tokens in no window)"
        )
    print(f"tokenizer: {prepared.tokenizer.name}, {prepared.tokenizer.num_tokens:,} tokens")
    print(f"corpus: {prepared.manifest['corpus']['name']}, sha256 {prepared.manifest['corpus']['sha256']}")
    return 0
