r"""The paper's gamma-hybrid of gamma 0.01 in a sliding window of L/4, aligned, with cross-entropy on settled tokens.

    hdlm train --config experiments/paper/gamma_slide.py --workdir runs/gamma_slide \
        --config.data.path='openwebtext/*.txt' --config.data.tokenizer=gpt2/tokenizer.json

Rates 1, 2, 4 and 8: --config.hyperschedule.rate=2 and so on.
Their settled rows see whole windows of rows, here they are causal. Settled rows are predicted in the plain layout only,
as published (model.inexact_context); generation then has no cache.

Expected (published): no number of its own.
"""

from hdlm_jax.config import default, override, sized


def get_config(arg=""):
    """The experiment at its published size; `arg` is '' or 'smoke'."""
    c = sized(default(), "base")
    c.data.update(source="text", tokenizer="tokenizer.json")
    c.model.update(visibility="prefix", inexact_context=True)
    c.hyperschedule.update(kind="slide", width=256, rate="1")
    c.model.update(conditioning=128, interpolation=0.01)
    c.optimizer.update(warmup=10_000, final_share=0.0, beta2=0.999, weight_decay=0.0)
    c.training.batch = 256
    c.noise_schedule.eps = 5e-3
    c.noising.update(kind="gamma_hybrid", gamma=0.01)
    c.loss.update(kind="published_score_entropy", settled_weight=1.0)
    c.sampler.kind = "analytic"
    small = {"data.source": "python_docs", "data.tokenizer": "bytes", "hyperschedule.width": 8}
    return override(sized(c, arg), small) if arg else c
