"""Perplexity under a Hugging Face causal model: the protocol with a stand-in, the numbers where torch is at hand."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from hdlm_jax.errors import UserError
from hdlm_jax.interop.causal_judge import judged

HERE = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
PYTHON = os.environ.get("TORCH_PYTHON") or (sys.executable if HERE else "")
REASON = "torch and transformers are not installed here, and TORCH_PYTHON names no interpreter that has them"
# A GPT-2 of three tokens, one layer, that knows no more than `scale` times random weights; what it makes of "abba".
MAKE = """
import json, sys, torch, tokenizers, transformers
folder, scale = sys.argv[1], float(sys.argv[2])
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<s>": 2}, unk_token="a"))
words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
torch.manual_seed(0)
sizes = dict(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=2)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
with torch.no_grad():
    for weight in model.parameters():
        weight.copy_(scale * torch.randn(weight.shape))
model.save_pretrained(folder)
ids = torch.tensor([[2, 0, 1, 1, 0]])
print(json.dumps(4 * model(ids, labels=ids).loss.item()))
"""


@pytest.fixture
def stand_in(tmp_path):
    """An interpreter that says what it is told to."""

    def make(said, status=0, complaint=""):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncat > {tmp_path}/asked\necho '{complaint}' >&2\necho '{said}'\nexit {status}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_texts_go_out_and_numbers_come_back(stand_in, tmp_path):
    said = json.dumps({"nats": [2.0, 4.0], "tokens": [1, 2], "versions": {"torch": "0"}})
    found = judged(["é", "abc"], str(tmp_path), stand_in(said))
    assert json.loads((tmp_path / "asked").read_text()) == {"folder": str(tmp_path), "texts": ["é", "abc"]}
    assert found.perplexity == pytest.approx(math.exp(6 / 3))
    assert found.bits_per_byte == pytest.approx(6 / 5 / math.log(2))
    assert found.versions == {"torch": "0"}


@pytest.mark.parametrize(
    ("said", "status", "message"),
    [
        ("", 1, "--causal-judge: got '.*', which failed under .*python: no such module"),
        ('{"nats": [0.0], "tokens": [0], "versions": {}}', 0, "texts: got 'nothing to predict'"),
        ('{"nats": [NaN], "tokens": [3], "versions": {}}', 0, "--causal-judge: got 'nats that are not finite'"),
    ],
)
def test_a_judge_that_fails_gives_no_number(said, status, message, stand_in, tmp_path):
    with pytest.raises(UserError, match=message):
        judged(["a"], str(tmp_path), stand_in(said, status, "no such module"))


def test_no_folder_and_no_interpreter(tmp_path):
    with pytest.raises(UserError, match="--causal-judge: got 'nowhere'; allowed: a folder"):
        judged(["a"], "nowhere")
    with pytest.raises(UserError, match="--causal-python: got 'no-such-python'; allowed: an interpreter"):
        judged(["a"], str(tmp_path), "no-such-python")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason=REASON)
@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_nats_are_the_models_own(scale, tmp_path):
    made = subprocess.run([PYTHON, "-c", MAKE, str(tmp_path), str(scale)], capture_output=True, text=True, check=True)
    expected = json.loads(made.stdout.splitlines()[-1])
    found = judged(["abba", "b"], str(tmp_path), PYTHON)
    np.testing.assert_array_equal(found.tokens, [4, 1])
    np.testing.assert_allclose(found.nats[0], expected, rtol=1e-5)
    assert (found.nats[0] == pytest.approx(4 * math.log(3))) == (scale == 0)
    with pytest.raises(UserError, match="a text has 10 tokens, the model takes 8"):
        judged(["a" * 9], str(tmp_path), PYTHON)
