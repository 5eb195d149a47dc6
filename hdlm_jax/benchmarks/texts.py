"""What a run's texts are like beside held-out ones: variety, a judge's perplexity, MAUVE, a Hugging Face judge's."""

import functools

import numpy as np

from hdlm_jax.errors import require
from hdlm_jax.evaluation import diversity, mauve, quality
from hdlm_jax.evaluation.report import Report
from hdlm_jax.interop import causal_judge
from hdlm_jax.lm import LanguageModel

DRAWS = 8  # of the noise of a judge that has noise
NATS = "judge nats/token"
NGRAMS = (1, 2, 3)


def check_judge(model: LanguageModel, judge: LanguageModel) -> None:
    """Refuses a judge of another tokenizer."""
    same = model.tokenizer.fingerprint == judge.tokenizer.fingerprint
    require(same, "--judge", judge.tokenizer.name, "a run with the tokenizer of --run")


def measure(
    model: LanguageModel,
    judge: LanguageModel | None,
    held_out_WxL: np.ndarray,
    seed: int = 0,
    clusters: int | None = None,
    causal: tuple[str, str] | None = None,
) -> Report:
    """Generates as many texts as half the held-out windows, with the run's own settings.

    Rows: the generated texts, and the second half of the held-out windows, which shows what a perfect model would get;
    MAUVE compares each with the first half.

    Args:
      model: the run that generates.
      judge: another run of the same tokenizer and text length; None leaves its numbers and MAUVE out.
      held_out_WxL: held-out windows, four at least.
      seed: of the texts, the judge's noise and the clusters.
      clusters: of MAUVE; None for its default.
      causal: a Hugging Face causal model's folder and an interpreter that has torch and transformers.

    Raises:
      UserError: too few windows, a judge of another tokenizer or length, one that fails.
    """
    num = len(held_out_WxL) // 2
    require(num >= 2, "--windows", len(held_out_WxL), "at least 4 (half of them for the texts to be compared with)")
    if judge is not None:
        check_judge(model, judge)
    out = model.generate(num_samples=num, seed=seed)
    tokens = {"generated": out.tokens, "held out": held_out_WxL[num : 2 * num]}
    rows = [{"texts": name, **_variety(tokens_BxL)} for name, tokens_BxL in tokens.items()]
    settings = {"texts": num, "seed": seed, "hyperschedule": out.hyperschedule.describe(), "calls": out.calls}
    settings |= {"step": model.step, "weights": model.weights, "sampler": model.config.sampler.to_dict()}
    if judge is not None:
        settings |= _judge(judge, rows, tokens.values(), held_out_WxL[:num], clusters, seed)
    if causal is not None:
        decoded = [[model.tokenizer.decode(text_L, end_of_text="\n") for text_L in texts] for texts in tokens.values()]
        settings |= _judge_causal(rows, decoded, *causal)
    return Report(rows, {}, settings)


def _judge(judge: LanguageModel, rows, texts, reference_BxL: np.ndarray, clusters: int | None, seed: int) -> dict:
    """Adds a run's judgement to each row; returns its settings."""
    features = functools.partial(quality.features, judge.parts, judge.params)
    reference_BxD = features(reference_BxL)
    for row, tokens_BxL in zip(rows, texts, strict=True):
        row |= judged_row(judge, tokens_BxL, seed)
        found = mauve.mauve(features(tokens_BxL), reference_BxD, clusters, seed=seed)
        row["MAUVE"] = found.score
    of_mauve = {name: value for name, value in found._asdict().items() if name != "score"}
    of_mauve["features"] = "the judge's last hidden rows, averaged over each text"
    return {"judge": {"folder": str(judge.folder), "step": judge.step, "draws": DRAWS}, "mauve": of_mauve}


def judged_row(judge: LanguageModel, tokens_BxL: np.ndarray, seed: int) -> dict:
    """A judge's nats per token with the standard error over texts, and its perplexity per token."""
    nats_B = quality.judged(judge.parts, judge.params, tokens_BxL, DRAWS, seed)
    error = float(nats_B.std(ddof=1) / len(nats_B) ** 0.5)
    return {NATS: float(nats_B.mean()), "standard error": error, "judge perplexity": float(np.exp(nats_B.mean()))}


def _judge_causal(rows: list[dict], texts: list[list[str]], folder: str, python: str) -> dict:
    """Adds a Hugging Face model's judgement to each row; returns its settings."""
    for row, batch in zip(rows, texts, strict=True):
        found = causal_judge.judged(batch, folder, python)
        row |= {"causal perplexity": found.perplexity, "causal bits/byte": found.bits_per_byte}
    return {"causal judge": {"folder": folder, "perplexity": "per token of its own", **found.versions}}


def _variety(tokens_BxL: np.ndarray) -> dict:
    found = {f"entropy-{n}": diversity.entropy(tokens_BxL, n) for n in NGRAMS[:2]}
    found |= {f"pooled entropy-{n}": diversity.pooled_entropy(tokens_BxL, n) for n in NGRAMS[:2]}
    found |= {f"distinct-{n}": diversity.distinct(tokens_BxL, n) for n in NGRAMS}
    return found | {"self-BLEU-4": diversity.self_bleu(tokens_BxL)}
