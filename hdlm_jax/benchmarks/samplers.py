"""What samplers make of one run at several rates: corrections, entropy, perplexity under an independent judge."""

import numpy as np

from hdlm_jax.errors import require
from hdlm_jax.evaluation import quality
from hdlm_jax.lm import LanguageModel

DRAWS = 8  # of the noise of a judge that has noise


def measure(
    model: LanguageModel,
    judge: LanguageModel,
    samplers: list[tuple[str, dict]],
    rates: list[str],
    texts: int,
    seed: int,
) -> list[dict]:
    """Generates `texts` texts with every sampler at every rate.

    Args:
      model: the run that generates, under its own hyperschedule.
      judge: another run of the same tokenizer and text length.
      samplers: names with their dials.
      rates: tokens settled per call; of flat, in steps of so many tokens on average.

    Raises:
      UserError: a judge of another tokenizer; whatever `LanguageModel.generate` refuses.
    """
    same = model.tokenizer.fingerprint == judge.tokenizer.fingerprint
    require(same, "--judge", judge.tokenizer.name, "a run with the tokenizer of --run")
    return [_row(model, judge, name, dials, rate, texts, seed) for name, dials in samplers for rate in rates]


def _row(model: LanguageModel, judge: LanguageModel, name: str, dials: dict, rate: str, texts: int, seed: int) -> dict:
    L = model.parts.model.length
    pace = {"steps": round(L / float(rate))} if model.parts.hs.kind == "flat" else {"rate": rate}
    out = model.generate(num_samples=texts, seed=seed, record=True, sampler=name, **dials, **pace)
    nats_B = quality.judged(judge.parts, judge.params, out.tokens, DRAWS, seed)
    return {
        "sampler": " ".join([name, *(f"{dial} {x:g}" for dial, x in dials.items())]),
        "rate": rate,
        "calls": out.hyperschedule.num_steps,
        "corrected": quality.corrected_share(out.trajectory, model.parts.process.mask),
        "entropy": quality.entropy(out.tokens),
        "judge nats/token": float(nats_B.mean()),
        "standard error": float(nats_B.std(ddof=1) / texts**0.5),
        "judge perplexity": float(np.exp(nats_B.mean())),
    }
