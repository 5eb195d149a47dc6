# Exported modeling file: it runs without this package, in an interpreter with torch and transformers.
"""-log p of texts under a Hugging Face causal model.

    echo '{"folder": "gpt2", "texts": ["Some text."]}' | python judge_hdlm.py

Prints one line of JSON: nats and predicted tokens of each text, and the versions of the libraries. The first token of a
text is predicted after the tokenizer's BOS; without one it is given and does not count.
"""

import json
import sys

import torch
import transformers


def judge(folder, texts):
    """Nats and number of predicted tokens, a list each; everything is read from `folder` alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.eval()
    limit = getattr(model.config, "max_position_embeddings", None)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    nats, counts = [], []
    for text in texts:
        ids = torch.tensor([begin + tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.long)
        if limit and ids.shape[1] > limit:
            raise SystemExit(f"a text has {ids.shape[1]} tokens, the model takes {limit}")
        predicted = max(ids.shape[1] - 1, 0)
        counts.append(predicted)
        if predicted == 0:
            nats.append(0.0)
            continue
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats.append(-log_p.gather(1, ids[0, 1:, None]).sum().item())
    return nats, counts


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    nats, tokens = judge(asked["folder"], asked["texts"])
    versions = {library.__name__: library.__version__ for library in (torch, transformers)}
    print(json.dumps({"nats": nats, "tokens": tokens, "versions": versions}))
