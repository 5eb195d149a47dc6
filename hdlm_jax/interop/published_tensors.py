"""The tensors of a published checkpoint and our parameters: names, shapes, orientation.

Matrices there are [out, in] and ours [in, out]; their blocks are numbered, ours stacked. Their vocabulary has
V = N + 1 rows, the mask's last, and ours is padded after them: nothing of the mask's column is lost.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from hdlm_jax.errors import UserError
from hdlm_jax.models.transformer import SINUSOIDS, TransformerConfig
from hdlm_jax.training.weights_file import padded, unpadded

FREQUENCIES = "rotary_emb.inv_freq"  # a buffer, not a parameter
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
LISTED = 6  # names printed of each kind when a file does not fit

Header = Mapping[str, tuple[str, tuple[int, ...]]]


class Place(NamedTuple):
    """Where one of their tensors lies among ours: our path, the block it belongs to, their shape."""

    path: str
    block: int | None
    shape: tuple[int, ...]


def places(model: TransformerConfig) -> dict[str, Place]:
    """Every parameter by its published name.

    >>> model = TransformerConfig(num_tokens=5, length=4, hidden=8, blocks=2, heads=2)
    >>> places(model)["blocks.1.attn_qkv.weight"]
    Place(path='blocks/qkv/kernel', block=1, shape=(24, 8))
    """
    D, F, V, C = model.hidden, model.mlp_ratio * model.hidden, model.vocabulary, model.conditioning
    found = {
        "vocab_embed.embedding": Place("embedding", None, (V, D)),
        "output_layer.norm_final.weight": Place("norm/scale", None, (D,)),
        "output_layer.linear.weight": Place("head_kernel", None, (V, D)),
        "output_layer.linear.bias": Place("head_bias", None, (V,)),
    }
    per_block = {
        "norm1.weight": ("norm_attention/scale", (D,)),
        "norm2.weight": ("norm_mlp/scale", (D,)),
        "attn_qkv.weight": ("qkv/kernel", (3 * D, D)),
        "attn_out.weight": ("out/kernel", (D, D)),
        **_linear("mlp.0", "mlp_in", F, D),
        **_linear("mlp.2", "mlp_out", D, F),
    }
    if C:
        per_block |= _linear("adaLN_modulation", "modulation", 6 * D, C)
        maps = _linear("sigma_map.mlp.0", "sigma_in", C, SINUSOIDS) | _linear("sigma_map.mlp.2", "sigma_out", C, C)
        found |= {name: Place(path, None, shape) for name, (path, shape) in maps.items()}
    for i in range(model.blocks):
        found |= {f"blocks.{i}.{name}": Place(f"blocks/{path}", i, s) for name, (path, s) in per_block.items()}
    return found


def _linear(theirs: str, ours: str, wide: int, narrow: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{theirs}.weight": (f"{ours}/kernel", (wide, narrow)), f"{theirs}.bias": (f"{ours}/bias", (wide,))}


def sizes(header: Header) -> dict[str, int]:
    """The sizes that the tensors themselves show, by the names of the published config; what is unclear is left out."""
    shape = lambda name: header.get(name, ("", ()))[1]
    numbers = {int(block[1]) for name in header if (block := re.match(r"blocks\.(\d+)\.", name))}
    found = {"model.n_blocks": max(numbers) + 1} if numbers else {}
    embedding, condition, half = shape("vocab_embed.embedding"), shape("sigma_map.mlp.2.bias"), shape(FREQUENCIES)
    if len(embedding) == 2:
        found |= {"tokenizer.tokens": embedding[0] - 1, "model.hidden_size": embedding[1]}
    if len(condition) == 1:
        found["model.cond_dim"] = condition[0]
    if len(embedding) == 2 and len(half) == 1 and half[0]:
        found["model.n_heads"] = embedding[1] // (2 * half[0])
    return found


def frequencies(model: TransformerConfig) -> np.ndarray:
    """Their rotary buffer, float32 [Dh / 2]: base^(-2 j / Dh)."""
    exponent = np.arange(0, model.head_size, 2, dtype=np.float32) / np.float32(model.head_size)
    return (1 / np.float32(model.rotary_base) ** exponent).astype(np.float32)


def read(place: Any, model: TransformerConfig, header: Header, tensor: Callable[[str], np.ndarray]):
    """All tensors by name, checked; a message lists everything that is wrong with them.

    Args:
      place: names the file in the message.
      model: the sizes that are wanted.
      header: name -> (dtype, shape) of the file.
      tensor: reads one of them.

    Raises:
      UserError: tensors that are missing, unexpected, of another shape or dtype, or not finite; rotary
        frequencies of another base.
    """
    wanted = {name: place.shape for name, place in places(model).items()}
    known = wanted.keys() & header.keys()
    shaped = {name for name in known if header[name][1] == wanted[name]}
    typed = {name for name in shaped if header[name][0] in DTYPES}
    found = {name: tensor(name) for name in sorted(typed)}
    lists = {
        "missing": sorted(wanted.keys() - header.keys()),
        "unexpected": sorted(header.keys() - wanted.keys() - {FREQUENCIES}),
        "of another shape": [f"{n} ({list(header[n][1])}, not {list(wanted[n])})" for n in sorted(known - shaped)],
        "of another dtype": [f"{n} ({header[n][0]}, not {', '.join(DTYPES)})" for n in sorted(shaped - typed)],
        "not finite": [name for name, x in found.items() if not np.isfinite(x.astype(np.float32)).all()],
    }
    if FREQUENCIES in header:
        buffer, ours = tensor(FREQUENCIES), frequencies(model)
        same = buffer.shape == ours.shape and np.allclose(buffer, ours, rtol=1e-2 if buffer.itemsize < 4 else 1e-5)
        lists[f"not those of base {model.rotary_base:g}"] = [] if same else [FREQUENCIES]
    text = "; ".join(f"{what}: {_some(names)}" for what, names in lists.items() if names)
    if text:
        raise UserError(f"{place}: not the tensors of this model. {text}")
    return found


def to_params(model: TransformerConfig, tensors: Mapping[str, np.ndarray]) -> dict:
    """Our parameters, float32, padded, from their tensors."""
    flat: dict[str, Any] = {}
    for name, place in places(model).items():
        x = _turned(place.path, tensors[name].astype(np.float32))
        if place.block is None:
            flat[place.path] = x
        else:
            flat.setdefault(place.path, []).append(x)
    stacked = {path: np.stack(x) if isinstance(x, list) else np.ascontiguousarray(x) for path, x in flat.items()}
    return padded(unflatten_dict(stacked, sep="/"), model.padded_vocabulary)


def from_params(
    model: TransformerConfig, params: Mapping[str, Any], dtypes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Their tensors from our parameters.

    Args:
      dtypes: name -> 'F32', 'F16' or 'BF16'; float32 where it says nothing.
    """
    flat = flatten_dict(unpadded(params, model.vocabulary), sep="/")
    tensors = {}
    for name, place in places(model).items():
        x = flat[place.path] if place.block is None else flat[place.path][place.block]
        tensors[name] = _turned(place.path, x).astype(DTYPES[dtypes.get(name, "F32")])
    return tensors


def _turned(path: str, x: np.ndarray) -> np.ndarray:
    return x.T if path.endswith("kernel") else x


def _some(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
