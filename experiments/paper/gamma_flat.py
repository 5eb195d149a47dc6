r"""The paper's gamma-hybrid of gamma 0.05, flat and aligned, trained by its published loss (not a bound).

    hdlm train --config experiments/paper/gamma_flat.py --workdir runs/gamma_flat \
        --config.data.path='openwebtext/*.txt' --config.data.tokenizer=gpt2/tokenizer.json

Rates 1, 2, 4 and 8 are sampler.steps = 1024, 512, 256 and 128. The published model of gamma 0.01:
--config.noising.gamma=0.01 --config.model.interpolation=0.01

Expected (published): zero-shot perplexity on Wikitext <= 30.0, on Lambada 45.4, on Pubmed 46.6, on Arxiv 40.6.
"""

from hdlm_jax.config import default, override, sized


def get_config(arg=""):
    """The experiment at its published size; `arg` is '' or 'smoke'."""
    c = sized(default(), "base")
    c.data.update(source="text", tokenizer="tokenizer.json")
    c.model.update(conditioning=128, interpolation=0.05)
    c.optimizer.update(warmup=10_000, final_share=0.0, beta2=0.999, weight_decay=0.0)
    c.training.batch = 256
    c.noise_schedule.eps = 5e-3
    c.noising.update(kind="gamma_hybrid", gamma=0.05)
    c.loss.update(kind="published_score_entropy")
    c.sampler.kind = "analytic"
    return override(sized(c, arg), {"data.source": "python_docs", "data.tokenizer": "bytes"}) if arg else c
