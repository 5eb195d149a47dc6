"""Makes a run folder of a published checkpoint (hdlm-group/hdlm-base-epsilon-0.01 and its kin).

  hdlm import downloads/hdlm-base-epsilon-0.01 --workdir runs/published
  hdlm import downloads/hdlm-base-gamma-0.01 --workdir runs/gamma --tokenizer downloads/gpt2
  hdlm sample --run runs/published --prompt "The "
  hdlm train --init runs/published --workdir runs/finetuned --config.data.source=text --config.data.path='books/*.txt'

The folder must hold config.json (or config.yaml) and model.safetensors; pickles (.bin, .pth) are refused.
Everything is checked before anything is written.
"""


def add_arguments(parser):
    """The verb's flags."""
    parser.add_argument("folder", metavar="DIR", help="the published folder")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run folder to make")
    tokenizer = "folder or tokenizer.json of the vocabulary (default: the published folder's own); 'none': tokens only"
    parser.add_argument("--tokenizer", metavar="DIR_OR_FILE", help=tokenizer)


def run(args) -> int:
    """Imports and prints what came of it."""
    from hdlm_jax.interop import published
    from hdlm_jax.models.transformer import num_parameters

    found = published.import_folder(args.folder, args.workdir, args.tokenizer)
    parts, model = found.parts, found.parts.model
    vocabulary = found.tokenizer.name if found.tokenizer.name != "tokens" else "no tokenizer: token ids only, no text"
    print(
        f"{args.workdir}: {num_parameters(found.params):,} parameters (hidden {model.hidden}, blocks {model.blocks},"
        f" vocabulary {model.vocabulary:,}), {model.prediction}; {parts.process.name}; {parts.hs.describe()}\n"
        f"network read as {parts.loss.reading!r}, {vocabulary}"
    )
    for note in found.imported.notes:
        print(f"note: {note}")
    return 0
