"""A run as a folder that `transformers` opens: PyTorch files of the network and its sampler, weights, tokenizer, card.

  model = AutoModel.from_pretrained(folder, trust_remote_code=True)
  tokens = model.generate(tokenizer("Once ", return_tensors="pt").input_ids)

The files of the network, `*_hdlm.py` in this folder of the package, are copied as they are and never imported here.
Tensors have the published names (`published_tensors`).
"""

import json
from pathlib import Path
from typing import Any

from hdlm_jax.config import block_fields
from hdlm_jax.diffusion import scores
from hdlm_jax.diffusion.noise_schedules import sigma_range
from hdlm_jax.interop import model_card, published_tensors, tokenizer_json
from hdlm_jax.models.parts import Parts
from hdlm_jax.training import weights_file

PROGRAMS = ("configuration_hdlm.py", "modeling_hdlm.py", "generation_hdlm.py")
AUTO_MAP = {"AutoConfig": "configuration_hdlm.HDLMConfig", "AutoModel": "modeling_hdlm.HDLMModel"}
EXACT_UNDER = ("epsilon_nelbo", "nelbo")  # losses that show tokens at 0+ only


def write(model: Any, out: Path) -> None:
    """Writes the folder into `out`, which is there.

    Every network is exported; `generate` of the folder knows the processes whose unmasked tokens stay (absorb,
    epsilon_hybrid), and refuses the others by name.

    Args:
      model: an `hdlm_jax.lm.LanguageModel`.
      out: an empty folder.

    Raises:
      UserError: a file cannot be written, or safetensors is not installed.
    """
    parts = model.parts
    tensors = published_tensors.from_params(parts.model, model.params, {})
    weights_file.save(out / weights_file.NAME, tensors, {"format": "pt"})
    for name, tree in (
        ("config.json", configuration(parts, model.config, model.tokenizer.end_of_text)),
        ("generation_config.json", generation(model.config, parts)),
    ):
        (out / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    for name in PROGRAMS:
        (out / name).write_bytes(Path(__file__).with_name(name).read_bytes())
    for name, content in tokenizer_json.files(model.tokenizer, parts.model.length).items():
        (out / name).write_bytes(content)
    (out / "README.md").write_text(model_card.text(model, generates(parts)), encoding="utf-8")


def configuration(parts: Parts, config: Any, end_of_text: int) -> dict[str, Any]:
    """config.json: sizes of the network, and what the sampler needs to know of the training."""
    model = parts.model
    block = lambda fields: dict(zip(("kind", "fields"), block_fields(fields), strict=True))
    flat = lambda fields: {"kind": block(fields)["kind"], **block(fields)["fields"]}
    return {
        "model_type": "hdlm",
        "architectures": ["HDLMModel"],
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "tie_word_embeddings": False,
        "num_tokens": model.num_tokens,
        "vocab_size": model.vocabulary,
        "mask_token_id": model.num_tokens,
        "bos_token_id": end_of_text if model.bos_id is None else model.bos_id,
        "eos_token_id": end_of_text,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.blocks,
        "num_attention_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "max_position_embeddings": model.length,
        "prediction": model.prediction,
        "visibility": model.visibility,
        "context_group": model.context_group,
        "inexact_context": model.inexact_context,
        "window_width": parts.hs.width,
        "conditioning": model.conditioning,
        "interpolation": model.interpolation,
        "rotary_base": model.rotary_base,
        "sigma_range": sigma_range(parts.schedule),
        "noise_schedule": flat(config.noise_schedule),
        "noising": flat(config.noising),
        "alpha_max": parts.process.alpha_max,
        "epsilon": parts.process.epsilon,
        "reading": parts.loss.reading,
        "hyperschedule": hyperschedule(parts),
        "generates": generates(parts),
        "learned_corrections": parts.loss.name not in EXACT_UNDER or config.sampler.untrained_correction,
    }


def hyperschedule(parts: Parts) -> dict[str, Any]:
    """Kind and fields of the trained hyperschedule; rates as texts, '3/2'."""
    plain = lambda value: value if isinstance(value, int) else str(value)
    return {"kind": parts.hs.kind, **{name: plain(value) for name, value in parts.hs.arguments}}


def generates(parts: Parts) -> bool:
    """Whether the exported files know the way back: tokens stay until their last step, x0 is what was learned."""
    return parts.process.frozen and parts.loss.reading not in scores.READINGS


def generation(config: Any, parts: Parts) -> dict[str, Any]:
    """generation_config.json: the experiment's sampler settings."""
    s = config.sampler
    corrects = {"eta": s.eta} if s.kind in ("acs", "acs_published") else {}
    filters = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    return {"do_sample": True, "max_length": parts.model.length, "sampler": s.kind, **corrects, **filters}
