"""The model card of an exported run: what it is, its bound, its sampler settings, how it is used."""

from pathlib import Path
from typing import Any

from hdlm_jax.models.transformer import num_parameters
from hdlm_jax.training import metrics, weights_file

USE = """```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
prompt = tokenizer(["", "The "], return_tensors="pt", padding=True)
for text in model.generate(**prompt):
    print(tokenizer.decode(text))
```
"""
USE_IDS = """```python
from transformers import AutoModel

model = AutoModel.from_pretrained(".", trust_remote_code=True)
print(model.generate(num_return_sequences=2))  # token ids
```
"""
CALL = """`generate` knows the way back of absorb and epsilon_hybrid only and refuses this model; hdlm_jax samples it.

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(".", trust_remote_code=True)
scores = model(input_ids, sigma=sigma).logits  # [texts, positions, vocabulary], row i of token i
```
"""
LIMITS = """`generate` takes `max_length`, `num_return_sequences`, `hyperschedule` with its `width`, `rate`, `block` or
`steps`, `sampler`, `eta`, `temperature`, `top_k`, `top_p` and a torch `generator`. Masks (id {mask}) in `input_ids` are
filled in. All rows are fed whenever a token is drawn: there is no cache, which costs time and leaves the law as it is.
"""


def text(model: Any, generates: bool) -> str:
    """README.md of the folder.

    Args:
      model: an `hdlm_jax.lm.LanguageModel`.
      generates: whether the exported files can sample it.
    """
    parts, c = model.parts, model.config
    net = parts.model
    size = num_parameters(weights_file.unpadded(model.params, net.vocabulary))
    use = CALL if not generates else USE_IDS if model.tokenizer.name == "tokens" else USE
    facts = {
        "hyperschedule": str(parts.hs),
        "noising": _block(c.noising),
        "noise schedule": parts.schedule.name,
        "loss": f"{parts.loss.name}, tokens read as {parts.loss.reading}",
        "network": f"{size:,} parameters, {net.blocks} blocks of width {net.hidden}",
        "rows": f"{net.prediction}, visibility {net.visibility}",
        "text": f"{net.length} tokens out of {net.num_tokens:,} ({model.tokenizer.name}); the mask is {net.num_tokens}",
        "weights": f"step {model.step:,}, {'running mean' if model.weights == 'ema' else 'raw'}",
    }
    sampler = {name: value for name, value in sorted(c.sampler.items()) if value not in ("", None)}
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- hdlm_jax\n- diffusion\n---\n",
        f"# {parts.process.name} language model under {parts.hs.kind}\n",
        "Trained with hdlm_jax: every position has its own noise level at every generation step.\n",
        _table(facts),
        "## Use\n",
        use,
        LIMITS.format(mask=net.num_tokens) if generates else "",
        "## Held-out text\n",
        bound(model),
        "## Sampler settings\n",
        "Those of the experiment, which `generate` reads from generation_config.json.\n",
        _table(sampler),
    ]
    return "\n".join(section for section in sections if section)


def bound(model: Any) -> str:
    """The last held-out bound that the run logged up to the step of the weights."""
    name = "held_out/bits_per_byte"
    records = [] if model.folder is None else metrics.read(Path(model.folder))
    found = [record for record in records if record.get(name) is not None and record["step"] <= model.step]
    if not found:
        return "Not measured.\n"
    last = found[-1]
    numbers = {key.removeprefix("held_out/"): f"{last[key]:.4f}" for key in sorted(last) if key.startswith("held_out/")}
    head = f"The bound (negative ELBO) that the run logged at step {last['step']:,}, running-mean weights"
    return f"{head}; terms in nats per token.\n\n{_table(numbers)}"


def _block(fields: Any) -> str:
    given = {name: value for name, value in fields.items() if name != "kind" and value is not None}
    return ", ".join([fields.kind, *(f"{name} {value}" for name, value in given.items())])


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"
