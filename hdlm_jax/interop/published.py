"""The authors' published checkpoints (`hdlm-group/hdlm-base-{epsilon,gamma}-*`): read, run as they run, written back.

A published folder holds config.json (or config.yaml), model.safetensors and GPT-2's tokenizer files. Imported, it
is a run folder; `published/` in it keeps the small files as they were, so that an export gives them back.
"""

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from hdlm_jax import config as configs
from hdlm_jax.data import byte_bpe, tokenizers
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.errors import UserError, require
from hdlm_jax.interop import folders, published_config, published_tensors
from hdlm_jax.interop.published_config import Imported, Published
from hdlm_jax.models import parts as builders
from hdlm_jax.models.attention import dense
from hdlm_jax.models.parts import Parts
from hdlm_jax.models.transformer import TransformerConfig, forward
from hdlm_jax.training import run_folder, weights_file
from hdlm_jax.training.checkpoints import Checkpoints

KEPT = "published"  # folder of a run that was imported
ABOUT = "tensors.json"
BUFFERS = "buffers.safetensors"
SMALL_FILES = (
    *published_config.NAMES,
    "generation_config.json",
    *byte_bpe.FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
CONVERT = (
    "import torch, safetensors.torch; "
    "safetensors.torch.save_file(torch.load('{name}', weights_only=True), 'model.safetensors')"
)


class Origin(NamedTuple):
    """What an imported run keeps of the published folder beside its weights.

    Attributes:
      files: small files by name, as they were.
      dtypes: of the tensors, by name.
      metadata: of their file, or None.
      buffers: tensors that are no parameters.
    """

    files: Mapping[str, bytes]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str] | None
    buffers: Mapping[str, np.ndarray]


class Checkpoint(NamedTuple):
    """A published folder, read and checked."""

    imported: Imported
    parts: Parts
    params: dict
    tokenizer: Tokenizer
    origin: Origin


def read(folder: str | Path, tokenizer: str | None = None) -> Checkpoint:
    """Reads and checks a published folder.

    Args:
      folder: config.json or config.yaml, and model.safetensors.
      tokenizer: a folder or file of the vocabulary; 'none' goes without; None takes the folder's own, if any.

    Raises:
      UserError: no such folder, weights as a pickle, a truncated file, a config that names no known family or
        does not fit the weights, tensors that are missing, unexpected, of another shape or dtype or not
        finite, a tokenizer of another vocabulary.
    """
    folder = Path(folder)
    require(folder.is_dir(), "DIR", str(folder), "a folder with a published checkpoint")
    published = published_config.read(folder)
    imported = published_config.to_experiment(published)
    path = _weights(folder)
    text = _tokenizer(folder, tokenizer, imported.num_tokens)
    parts = builders.build(imported.config, imported.num_tokens, text.bos_id)
    with weights_file.opened(path) as file:
        header = weights_file.header(file)
        _check_sizes(published, path, header)
        tensors = published_tensors.read(path, parts.model, header, file.get_tensor)
        buffers = {name: file.get_tensor(name) for name in header if name not in tensors}
        metadata = file.metadata()
    files = {name: (folder / name).read_bytes() for name in SMALL_FILES if (folder / name).is_file()}
    dtypes = {name: dtype for name, (dtype, _) in header.items()}
    params = published_tensors.to_params(parts.model, tensors)
    return Checkpoint(imported, parts, params, text, Origin(files, dtypes, metadata, buffers))


def import_folder(folder: str | Path, workdir: str | Path, tokenizer: str | None = None) -> Checkpoint:
    """Makes a run folder of a published one; it appears whole or not at all.

    Args:
      folder, tokenizer: as `read`.
      workdir: the run folder, new or empty.

    Raises:
      UserError: as `read`; `workdir` is not free or cannot be written.
    """
    workdir = Path(workdir)
    folders.require_free(workdir, "--workdir")
    found = read(folder, tokenizer)
    config = configs.override(found.imported.config, {"data.tokenizer": str(workdir)})
    with folders.whole(workdir, "--workdir") as partial:
        run_folder.write_whole(partial / "config.json", configs.to_json(config))
        environment = json.dumps(run_folder.environment(), indent=2, sort_keys=True) + "\n"
        run_folder.write_whole(partial / "env.json", environment)
        found.tokenizer.save(partial)
        keep(found.origin, partial)
        with Checkpoints(partial / "checkpoints") as saved:
            saved.save(0, {"params": jax.tree.map(jnp.asarray, found.params)})
    return found


def keep(origin: Origin, folder: Path) -> None:
    """Writes what `kept` reads, into `published/` of a folder."""
    place = folder / KEPT
    place.mkdir()
    for name, content in origin.files.items():
        (place / name).write_bytes(content)
    about = {"dtypes": dict(origin.dtypes), "metadata": origin.metadata}
    (place / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    weights_file.save(place / BUFFERS, origin.buffers, None)


def kept(folder: Path) -> Origin | None:
    """The origin of an imported run; None for other folders."""
    place = folder / KEPT
    if not place.is_dir():
        return None
    about = json.loads((place / ABOUT).read_text(encoding="utf-8"))
    files = {path.name: path.read_bytes() for path in place.iterdir() if path.name in SMALL_FILES}
    with weights_file.opened(place / BUFFERS) as file:
        buffers = {name: file.get_tensor(name) for name in weights_file.header(file)}
    return Origin(files, about["dtypes"], about["metadata"], buffers)


def write(
    model: TransformerConfig, config: ConfigDict, params: Any, tokenizer: Tokenizer, origin: Origin | None, out: Path
) -> None:
    """Writes a folder of the published layout into `out`, which is there.

    An imported run gives back the files that it came from, with its weights. Other runs get a config.json of the
    published fields and, where they have a byte-level BPE, its tokenizer.json.

    Raises:
      UserError: a run that the authors' code cannot open.
    """
    if origin is None:
        tree = published_config.of_experiment(config, model.num_tokens)
        files = {"config.json": (json.dumps(tree, indent=2) + "\n").encode()}
        files |= {"tokenizer.json": tokenizer.model} if tokenizer.name == "byte_bpe" else {}
        buffers = {published_tensors.FREQUENCIES: published_tensors.frequencies(model)}
        origin = Origin(files, {}, {"format": "pt"}, buffers)
    for name, content in origin.files.items():
        (out / name).write_bytes(content)
    tensors = published_tensors.from_params(model, params, origin.dtypes) | dict(origin.buffers)
    weights_file.save(out / weights_file.NAME, tensors, origin.metadata)


@functools.partial(jax.jit, static_argnums=0)
def outputs(
    model: TransformerConfig,
    params: dict,
    tokens_BxL: Array,
    sigma_BxL: Array | None = None,
    visible: Array | None = None,
    positions_BxL: Array | None = None,
) -> Array:
    """What the authors' forward pass returns, float32 [B, L, V]: row i reads token i, shifted or not.

    Of an epsilon model the head's scores, the mask's column as its weights make it. Of a gamma model log-scores,
    these less log(e^sigma - 1) and log N; of a shifted one the entry of each row's next token is 0.

    Args:
      model: sizes; a conditioned network is a gamma model.
      params: as imported.
      tokens_BxL: int32, tokens or the mask.
      sigma_BxL: noise levels, for gamma models.
      visible: bool [L, L], which rows (first axis) see which; None: all. A row that sees none is undefined.
      positions_BxL: rotary positions; None: 0 .. L-1.
    """
    B, L = tokens_BxL.shape
    positions = jnp.broadcast_to(jnp.arange(L)[None], (B, L)) if positions_BxL is None else positions_BxL
    attention = dense() if visible is None else dense(visible[None])
    hidden, _ = forward(model, params, tokens_BxL, positions, attention, sigma_BxR=sigma_BxL)
    V = model.vocabulary
    kernel, bias = params["head_kernel"][:, :V].astype(hidden.dtype), params["head_bias"][:V]
    out = jnp.einsum("brd,dv->brv", hidden, kernel, preferred_element_type=jnp.float32) + bias[None, None]
    if not model.conditioning:
        return out
    out = out - (jnp.log(jnp.expm1(sigma_BxL)) + math.log(model.num_tokens))[..., None]
    if model.prediction == "aligned":
        return out
    after = jnp.pad(tokens_BxL[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(jnp.arange(V)[None, None] == after[..., None], 0.0, out)


def _weights(folder: Path) -> Path:
    path = folder / weights_file.NAME
    if path.is_file():
        return path
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        convert = CONVERT.format(name=pickles[0])
        raise UserError(
            f"DIR: {folder} has its weights as a pickle ({pickles[0]}), which can run any program when it is read;"
            f' allowed: model.safetensors. To convert, in that folder and where PyTorch is: python -c "{convert}"'
        )
    raise UserError(f"DIR: no {weights_file.NAME} in {folder}; allowed: a folder with the weights in that file")


def _tokenizer(folder: Path, given: str | None, num_tokens: int) -> Tokenizer:
    if given == "none" or (given is None and not byte_bpe.is_here(folder)):
        return tokenizers.tokens_only(num_tokens)
    tokenizer = tokenizers.build(str(folder) if given is None else given)
    allowed = f"one of {num_tokens:,} tokens, as in the checkpoint's config"
    fits = tokenizer.num_tokens == num_tokens
    require(fits, "--tokenizer", f"a vocabulary of {tokenizer.num_tokens:,} tokens in {given or folder}", allowed)
    return tokenizer


def _check_sizes(published: Published, path: Path, header: published_tensors.Header) -> None:
    """Raises `UserError` naming the sizes in which config and weights differ, with both."""
    there = published_tensors.sizes(header)
    if published.family == "epsilon_hybrid":  # it has no use for its cond_dim
        there.pop("model.cond_dim", None)
    wrong = {name: n for name, n in there.items() if published.size(name) != n}
    if wrong:
        both = [f"{name} is {published.size(name)} there and {n} here" for name, n in wrong.items()]
        raise UserError(f"{path.parent}: {published.name} does not fit {path.name}: {'; '.join(both)}")
