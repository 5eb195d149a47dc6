"""What a run makes of its context, its confidence and wrong tokens; what its texts are like.

  hdlm diagnose context --run runs/mdlm
  hdlm diagnose calibration --run runs/mdlm --token sampled --out calibration.json
  hdlm diagnose corrections --run runs/epsilon --sampler acs --eta 0.5
  hdlm diagnose repair --run runs/epsilon --share 0.1 --calls 4
  hdlm diagnose texts --run runs/epsilon --judge runs/ar --windows 512

All but `texts` read held-out windows alone. `context` hides and shuffles what stands right of a predicted position in
its window: a loss that does not move is that of a model which predicts from left to right. `calibration` compares the
probability of tokens with how often they are right. `corrections` counts what one call of a sampler does to the tokens
of noised text, `repair` what its last calls do to text of which a share of the tokens was replaced. `texts` generates
half as many texts as there are windows and measures entropy, distinct n-grams and self-BLEU; with --judge also a run's
perplexity and MAUVE, with --causal-judge a Hugging Face model's perplexity. Settings stand beside the numbers.
"""

import json


def add_arguments(parser):
    """The verb's flags."""
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    for name, (summary, arguments, measure) in KINDS.items():
        kind = kinds.add_parser(name, help=summary, description=summary)
        kind.set_defaults(measure=measure)
        kind.add_argument("--run", dest="folder", required=True, metavar="DIR", help="a run folder")
        kind.add_argument("--weights", default="ema", help="'ema' (default) or 'raw'")
        kind.add_argument("--windows", type=int, default=256, help="the first so many, 0 for all (default: 256)")
        kind.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
        arguments(kind)
        kind.add_argument("--out", metavar="FILE", help="also write JSON here")


def run(args) -> int:
    """Measures, prints a table, and writes JSON where asked to."""
    from hdlm_jax import files, lm
    from hdlm_jax.benchmarks.timing import table
    from hdlm_jax.training.run_folder import environment

    model = lm.load(args.folder, args.weights)
    tokens_WxL, _ = model.held_out_windows(args.folder, args.windows)
    report = args.measure(args, model, tokens_WxL)
    print(f"{len(tokens_WxL)} held-out windows, step {model.step}, weights {model.weights}; {_words(report.settings)}")
    print(table(report.rows))
    if report.summary:
        print(_words(report.summary))
    if args.out:
        about = {"environment": environment(), "run": args.folder, "step": model.step, "weights": model.weights}
        files.write_whole(files.place(args.out, "--out"), json.dumps({**about, **report._asdict()}, indent=2) + "\n")
    return 0


def _words(values: dict) -> str:
    text = lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)
    return ", ".join(f"{name} {text(x)}" for name, x in values.items() if not isinstance(x, dict))


def _batch(kind):
    kind.add_argument("--batch", type=int, default=32, help="windows at a time (default: 32)")


def _drawn(kind):
    _batch(kind)
    kind.add_argument("--draws", type=int, default=4, help="of the noise of every window (default: 4)")


def _context(args, model, tokens_WxL):
    from hdlm_jax.evaluation import diagnostics

    return diagnostics.context(model.parts, model.params, tokens_WxL, args.draws, args.seed, args.batch)


def _calibration_arguments(kind):
    _drawn(kind)
    kind.add_argument("--token", default="top", help="'top' (default), the likeliest token, or 'sampled', a drawn one")
    kind.add_argument("--bins", type=int, default=10, help="of the probability (default: 10)")


def _calibration(args, model, tokens_WxL):
    from hdlm_jax.evaluation import diagnostics

    given = args.token, args.bins, args.draws, args.seed, args.batch
    return diagnostics.calibration(model.parts, model.params, tokens_WxL, *given)


def _sampler_arguments(kind):
    kind.add_argument("--sampler", default="acs", help="a name as for `hdlm sample` (default: acs)")
    kind.add_argument("--temperature", type=float, default=1.0, help="of the network's scores (default: 1)")
    kind.add_argument("--eta", type=float, help="its dial of that name (default: the run's own)")


def _corrections_arguments(kind):
    _drawn(kind)
    _sampler_arguments(kind)


def _corrections(args, model, tokens_WxL):
    from hdlm_jax.evaluation import corrections

    rule, dials = _rule(args, model)
    given = args.temperature, args.draws, args.seed, args.batch
    return _with(corrections.one_call(model.parts, model.params, tokens_WxL, rule, *given), dials)


def _repair_arguments(kind):
    _batch(kind)
    _sampler_arguments(kind)
    kind.add_argument("--share", type=float, default=0.1, help="of the tokens that are replaced (default: 0.1)")
    kind.add_argument("--calls", type=int, default=1, help="of the sampler, the last so many (default: 1)")


def _repair(args, model, tokens_WxL):
    from hdlm_jax.evaluation import corrections

    rule, dials = _rule(args, model)
    given = args.temperature, args.share, args.calls, args.seed, args.batch
    return _with(corrections.repair(model.parts, model.params, tokens_WxL, rule, *given), dials)


def _rule(args, model):
    """The sampler asked for, and its dials."""
    from hdlm_jax.diffusion import samplers

    dials = {name: model.config.sampler[name] for name in samplers.dials_of(args.sampler)}
    dials |= {} if args.eta is None else {"eta": args.eta}
    rule = samplers.build(args.sampler, model.parts.process, reading=model.parts.loss.reading, **dials)
    return rule, dials


def _with(report, dials: dict):
    return report._replace(settings=report.settings | dials)


def _texts_arguments(kind):
    kind.add_argument("--judge", metavar="DIR", help="a run of the same tokenizer and text length")
    kind.add_argument("--clusters", type=int, help="of MAUVE (default: a tenth of the texts, at least 2)")
    kind.add_argument(
        "--causal-judge", metavar="DIR", help="a folder with a Hugging Face causal model and its tokenizer"
    )
    kind.add_argument("--causal-python", default="", metavar="FILE", help="an interpreter with torch and transformers")


def _texts(args, model, tokens_WxL):
    from hdlm_jax import lm
    from hdlm_jax.benchmarks import texts

    judge = None if args.judge is None else lm.load(args.judge)
    causal = None if args.causal_judge is None else (args.causal_judge, args.causal_python)
    return texts.measure(model, judge, tokens_WxL, args.seed, args.clusters, causal)


KINDS = {
    "context": ("whether the loss moves when what stands to the right is hidden or shuffled", _drawn, _context),
    "calibration": ("the probability of tokens against how often they are right", _calibration_arguments, _calibration),
    "corrections": (
        "what one call of a sampler does to the tokens of noised text",
        _corrections_arguments,
        _corrections,
    ),
    "repair": ("how many replaced tokens a sampler's last calls restore, and damage", _repair_arguments, _repair),
    "texts": ("variety of generated texts; perplexity and MAUVE under judges", _texts_arguments, _texts),
}
