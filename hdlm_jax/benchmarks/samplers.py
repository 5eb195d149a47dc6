"""What samplers make of one run at several rates: corrections, variety, perplexity under an independent judge."""

from hdlm_jax.benchmarks.texts import NATS, check_judge, judged_row
from hdlm_jax.evaluation import diagnostics, diversity, quality
from hdlm_jax.lm import LanguageModel


def measure(
    model: LanguageModel,
    judge: LanguageModel,
    samplers: list[tuple[str, dict]],
    rates: list[str],
    texts: int,
    seed: int,
) -> list[dict]:
    """Generates `texts` texts with every sampler at every rate; `knee` marks where more calls stop paying.

    Args:
      model: the run that generates, under its own hyperschedule.
      judge: another run of the same tokenizer and text length.
      samplers: names with their dials.
      rates: tokens settled per call; of flat, in steps of so many tokens on average.

    Raises:
      UserError: a judge of another tokenizer; whatever `LanguageModel.generate` refuses.
    """
    check_judge(model, judge)
    rows = []
    for name, dials in samplers:
        found = [_row(model, judge, name, dials, rate, texts, seed) for rate in rates]
        knee = diagnostics.knee([row["calls"] for row in found], [row[NATS] for row in found])
        rows += [{**row, "knee": "yes" if i == knee else ""} for i, row in enumerate(found)]
    return rows


def _row(model: LanguageModel, judge: LanguageModel, name: str, dials: dict, rate: str, texts: int, seed: int) -> dict:
    L = model.parts.model.length
    pace = {"steps": round(L / float(rate))} if model.parts.hs.kind == "flat" else {"rate": rate}
    out = model.generate(num_samples=texts, seed=seed, record=True, sampler=name, **dials, **pace)
    return {
        "sampler": " ".join([name, *(f"{dial} {x:g}" for dial, x in dials.items())]),
        "rate": rate,
        "calls": out.calls,
        "corrected": quality.corrected_share(out.trajectory),
        "entropy": diversity.entropy(out.tokens),
        "distinct-2": diversity.distinct(out.tokens, 2),
        **judged_row(judge, out.tokens, seed),
    }
