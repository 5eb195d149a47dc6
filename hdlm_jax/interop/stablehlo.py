"""The denoiser and the whole sampler as programs that run without this package: StableHLO, by `jax.export`.

A folder of this form is one of our own (`hdlm_jax.load` opens it) with `denoiser.stablehlo`, `sampler.stablehlo` and
`functions.json`, which says what they take and give. The weights stay in `model.safetensors` and are an argument:

  import jax, numpy as np
  from safetensors.numpy import load_file
  params = load_file("model.safetensors")
  sampler = jax.export.deserialize(bytearray(open("sampler.stablehlo", "rb").read()))
  tokens = jax.jit(sampler.call)(params, np.zeros((4, 64), np.int32), np.zeros((4, 64), bool), np.uint32(0))

`denoiser` has symbolic batch and length. `sampler` has a symbolic batch; its length is that of its hyperschedule.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax import export as jax_export
from ml_collections import ConfigDict

from hdlm_jax.diffusion.noise_schedules import sigma_range
from hdlm_jax.diffusion.phases import Phase
from hdlm_jax.errors import UserError
from hdlm_jax.generation import sampling
from hdlm_jax.generation.chain import Chain, trailing_row
from hdlm_jax.models import layouts
from hdlm_jax.models.parts import Parts
from hdlm_jax.models.transformer import forward, logits
from hdlm_jax.training import weights_file

ABOUT = "functions.json"
SUFFIX = ".stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


class Argument(NamedTuple):
    """What a function takes or gives: its shape in numbers and symbols ('b' texts, 'l' positions)."""

    shape: tuple[int | str, ...]
    dtype: str
    meaning: str


class Function(NamedTuple):
    """A function to export.

    Attributes:
      summary: what it does.
      call: (flat parameters, *arguments) -> result.
      arguments: by name, in order, those after the parameters.
      result: what it gives.
    """

    summary: str
    call: Callable[..., Array]
    arguments: Mapping[str, Argument]
    result: Argument


def write(parts: Parts, sampler: ConfigDict, params: Any, out: Path) -> None:
    """Writes the functions and their description into `out`, beside the weights.

    Args:
      parts: of the experiment.
      sampler: its `sampler` block; the settings are fixed in the exported sampler.
      params: the weights, for their names, shapes and dtypes.
      out: a folder with `model.safetensors`.

    Raises:
      UserError: sampler settings that do not fit the model, or a package that is missing.
    """
    _require_flatbuffers()
    _, weights = flat_weights(params, parts.model.vocabulary)
    about = {}
    for name, function in functions(parts, sampler).items():
        program = exported(function, weights, parts.model.length)
        (out / f"{name}{SUFFIX}").write_bytes(program.serialize())
        about[name] = {"file": f"{name}{SUFFIX}", **_description(function, weights)}
    tree = {"format": "jax.export", "jax": jax.__version__, "platforms": PLATFORMS, "weights": weights_file.NAME}
    tree |= _about_model(parts, sampler) | {"functions": about}
    (out / ABOUT).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def flat_weights(params: Any, vocabulary: int) -> tuple[dict[str, np.ndarray], dict[str, Argument]]:
    """Weights as `model.safetensors` has them, by dotted name and with V rows, and what they are as arguments."""
    flat = flatten_dict(weights_file.unpadded(params, vocabulary), sep=".")
    return flat, {name: Argument(x.shape, str(x.dtype), "the weights of this name") for name, x in sorted(flat.items())}


def functions(parts: Parts, sampler: ConfigDict) -> dict[str, Function]:
    """The functions of an experiment by name: its denoiser, and its sampler under the trained hyperschedule.

    Raises:
      UserError: sampler settings that do not fit the model.
    """
    chain = sampling.chain(parts, parts.hs, sampler)
    # weights have V rows; kernels of one platform are none for the others
    chain = chain._replace(config=dataclasses.replace(chain.config, vocabulary_multiple=1, attention="xla"))
    N, L = parts.model.num_tokens, parts.model.length
    texts = Argument(("b", "l"), "int32", f"tokens 0 .. {N - 1}, or the mask {N}")
    step = {"tokens": texts}
    if parts.model.visibility == "prefix":
        step["start"] = Argument(("b",), "int32", "first position of the window; what lies before it is settled")
        step["stop"] = Argument(("b",), "int32", "end of the window; what lies behind it is seen by no row")
    if parts.model.conditioning:
        step["sigma"] = Argument(("b", "l"), "float32", "noise level, -log of the survival; clipped as in training")
    whole = {
        "tokens": Argument(("b", L), "int32", "the given tokens; elsewhere anything"),
        "given": Argument(("b", L), "bool", "which tokens are given; a prompt is a run of them from position 0"),
        "seed": Argument((), "uint32", "of all draws; a text depends on it and on its row"),
    }
    scores = Argument(("b", "l", N + 1), "float32", "row i: scores of token i; -inf at the mask")
    finished = Argument(("b", L), "int32", "the finished texts")
    return {
        "denoiser": Function("The network, once.", functools.partial(_denoise, chain, tuple(step)), step, scores),
        "sampler": Function(
            "A whole generation, from noise to finished texts.", functools.partial(_sample, chain), whole, finished
        ),
    }


def exported(function: Function, weights: Mapping[str, Argument], length: int) -> jax_export.Exported:
    """A function for all of `PLATFORMS`, with any number of texts and, where its shapes say 'l', up to `length`."""
    used = sorted({size for x in function.arguments.values() for size in x.shape if isinstance(size, str)})
    bounds = [f"{name} >= 1" for name in used] + [f"l <= {length}"] * ("l" in used)
    symbols = dict(zip(used, jax_export.symbolic_shape(", ".join(used), constraints=bounds), strict=True))

    def abstract(x: Argument) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(symbols.get(size, size) for size in x.shape), jnp.dtype(x.dtype))

    params = {name: abstract(x) for name, x in weights.items()}
    call = jax_export.export(jax.jit(function.call), platforms=PLATFORMS)
    return call(params, *(abstract(x) for x in function.arguments.values()))


def _denoise(chain: Chain, names: tuple[str, ...], flat_params: dict, *arguments: Array) -> Array:
    given = dict(zip(names, arguments, strict=True))
    model, tokens_BxL = chain.config, given["tokens"]
    B, L = tokens_BxL.shape
    one, edge = jnp.ones((B, L)), jnp.zeros((B, L), jnp.int32)
    start, stop = (edge + x[:, None] for x in (given.get("start", edge[:, 0]), given.get("stop", edge[:, 0] + L)))
    phase = Phase(one, one, one, one, start, stop, one)
    rows = layouts.plain(model, tokens_BxL, phase, trailing_row(chain))
    sigma_BxR = None
    if model.conditioning:
        low, high = sigma_range(chain.schedule)
        sigma_BxR = layouts.held(model, jnp.clip(given["sigma"], low, high), rows.tokens.shape[1], low)
    params = unflatten_dict(flat_params, sep=".")
    hidden, _ = forward(model, params, rows.tokens, rows.positions, rows.attention, sigma_BxR=sigma_BxR)
    return logits(model, params, hidden[:, :L])


def _sample(chain: Chain, flat_params: dict, tokens_BxL: Array, given_BxL: Array, seed: Array) -> Array:
    params = unflatten_dict(flat_params, sep=".")
    B, L = tokens_BxL.shape
    return sampling.complete(chain, params, tokens_BxL, given_BxL, L - 1, sampling.keys(seed, B)).x


def _description(function: Function, weights: Mapping[str, Argument]) -> dict[str, Any]:
    plain = lambda name, x: {"name": name, "shape": list(x.shape), "dtype": x.dtype, "meaning": x.meaning}
    params = [plain(f"params[{name!r}]", x) for name, x in weights.items()]
    arguments = params + [plain(name, x) for name, x in function.arguments.items()]
    for position, argument in enumerate(arguments):
        argument["position"] = position
    return {"summary": function.summary, "arguments": arguments, "results": [plain("result", function.result)]}


def _about_model(parts: Parts, sampler: ConfigDict) -> dict[str, Any]:
    model = parts.model
    return {
        "symbols": {"b": "texts, at least 1", "l": f"positions, 1 .. {model.length}"},
        "length": model.length,
        "num_tokens": model.num_tokens,
        "mask_id": model.num_tokens,
        "bos_id": model.bos_id,
        "hyperschedule": str(parts.hs),
        "sampler": sampler.to_dict(),
    }


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401 (jax.export serialises with it)
    except ImportError as error:
        raise UserError(
            "--format: 'stablehlo' needs a package: pip install flatbuffers (or 'hdlm_jax[export]')"
        ) from error
