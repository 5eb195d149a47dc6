"""Text to windows of token ids: corpora, tokenizers, preparation on disk, batches.

Nothing here imports grain, sentencepiece, array_record or TFDS until it is used.
"""

from hdlm_jax.data.corpora import Corpus, read_text
from hdlm_jax.data.pipeline import TextWindows, batch_at, batches, held_out_batches, windows_of_text
from hdlm_jax.data.prepare import DataConfig, Prepared, open_or_prepare, open_prepared
from hdlm_jax.data.tokenizers import Tokenizer

__all__ = [
    "Corpus",
    "DataConfig",
    "Prepared",
    "TextWindows",
    "Tokenizer",
    "batch_at",
    "batches",
    "held_out_batches",
    "open_or_prepare",
    "open_prepared",
    "read_text",
    "windows_of_text",
]
