"""A byte-level BPE vocabulary of GPT-2's form, small enough to make at once."""

import functools

SAMPLE = "the cat sat on a mat and then the hen ran "


@functools.cache
def small_vocabulary(end_of_text: str = "<|endoftext|>", **pre_tokenizer) -> str:
    """A tokenizer.json: the 256 bytes, some merges, and a special token at the end."""
    import tokenizers

    vocabulary = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    vocabulary.pre_tokenizer = byte_level(**{"add_prefix_space": False} | pre_tokenizer)
    vocabulary.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=[], initial_alphabet=sorted(byte_level.alphabet()), show_progress=False
    )
    vocabulary.train_from_iterator([SAMPLE * 20], trainer)
    vocabulary.add_special_tokens([end_of_text])
    return vocabulary.to_str()
