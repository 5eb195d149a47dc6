"""Perplexity of texts under a Hugging Face causal model, computed by an interpreter that has PyTorch."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hdlm_jax.errors import UserError, require

PROGRAM = Path(__file__).with_name("judge_hdlm.py")


class Judged(NamedTuple):
    """What a causal model makes of texts.

    Attributes:
      nats: float64 [B], -log p of each text.
      tokens: int [B], the tokens of its own that were predicted.
      num_bytes: int [B], of each text.
      versions: of the libraries that computed it.
    """

    nats: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray
    versions: dict[str, str]

    @property
    def perplexity(self) -> float:
        """exp of the nats per token of the judge's own."""
        return math.exp(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, to compare judges with different tokenizers."""
        return float(self.nats.sum() / self.num_bytes.sum() / math.log(2))


def judged(texts: list[str], folder: str, python: str = "") -> Judged:
    """Runs the judge in a process of its own; nothing is downloaded.

    Args:
      texts: to judge, each on its own.
      folder: of the model and its tokenizer.
      python: an interpreter that has torch and transformers; '' is this one.

    Raises:
      UserError: no such folder or interpreter, the program's last words where it fails, texts of no token, nats that
        are not finite.
    """
    require(Path(folder).is_dir(), "--causal-judge", folder, "a folder with a Hugging Face causal model")
    asked = json.dumps({"folder": folder, "texts": texts})
    try:
        done = subprocess.run([python or sys.executable, PROGRAM], input=asked, capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"--causal-python: got {python!r}; allowed: an interpreter ({error.strerror})") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"--causal-judge: got {folder!r}, which failed under {python or sys.executable}: {said}")
    found = json.loads(done.stdout.splitlines()[-1])
    nats, tokens = np.array(found["nats"], float), np.array(found["tokens"], int)
    require(
        int(tokens.sum()) > 0, "texts", "nothing to predict", "texts of two tokens of the judge's, or a judge with BOS"
    )
    finite = bool(np.isfinite(nats).all())
    require(finite, "--causal-judge", "nats that are not finite", "a model that gives every text some probability")
    return Judged(nats, tokens, np.array([len(text.encode()) for text in texts]), found["versions"])
