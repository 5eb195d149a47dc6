"""The paper's gamma-hybrid, flat: masks and shuffled tokens at every level, scores learned by exact score entropy.

    hdlm train --config experiments/systems/gamma_flat.py --workdir runs/gamma_flat  # minutes on 2 cores
    hdlm train --config experiments/systems/gamma_flat.py:base --workdir runs/gamma_flat  # the published size

`loss.kind` 'published_score_entropy' trains on the authors' published loss, which is not a bound.

Expected at the published size: OpenWebText, L 1024: zero-shot perplexity on Wikitext <= 30.0, on Lambada 45.4
(the paper's best gamma-hybrid, by the published loss; see there).
"""

from hdlm_jax.config import default, sized


def get_config(arg=""):
    """The experiment; `arg` is '', 'smoke' or 'base'."""
    c = default()
    c.data.length = 128
    c.model.update(hidden=128, blocks=4, heads=4, dropout=0.0, remat="none", conditioning=128, interpolation=0.05)
    c.optimizer.update(learning_rate=2e-3, warmup=100, ema=0.99)
    c.training.update(steps=2000, batch=32, evaluate_every=500, checkpoint_every=500)
    c.noise_schedule.eps = 5e-3
    c.noising.update(kind="gamma_hybrid", gamma=0.05)
    c.loss.kind = "score_entropy"
    c.sampler.kind = "analytic"
    return sized(c, arg)
