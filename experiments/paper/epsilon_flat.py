r"""The paper's epsilon-hybrid, flat and aligned, trained by its cross-entropy and sampled with corrections.

    hdlm train --config experiments/paper/epsilon_flat.py --workdir runs/epsilon_flat \
        --config.data.path='openwebtext/*.txt' --config.data.tokenizer=gpt2/tokenizer.json

Rates 1, 2, 4 and 8 are sampler.steps = 1024, 512, 256 and 128. The published model of epsilon 0 (masked diffusion):
--config.noising.epsilon=0 --config.sampler.kind=ancestral

Expected (published): zero-shot perplexity on Wikitext <= 32.5, on Lambada 50.2, on Pubmed 41.2, on
Arxiv 37.8. MAUVE with eta 0.25 at rates 8, 4, 2, 1: .955, .821, .859, .928; without corrections .950, .944, .848, .779.
"""

from hdlm_jax.config import default, override, sized


def get_config(arg=""):
    """The experiment at its published size; `arg` is '' or 'smoke'."""
    c = sized(default(), "base")
    c.data.update(source="text", tokenizer="tokenizer.json")
    c.optimizer.update(warmup=0, final_share=4e-5 / 3e-4)
    c.training.batch = 512
    c.noising.update(kind="epsilon_hybrid", epsilon=0.01)
    c.loss.kind = "hybrid_cross_entropy"
    c.sampler.update(kind="acs", eta=0.25)
    return override(sized(c, arg), {"data.source": "python_docs", "data.tokenizer": "bytes"}) if arg else c
