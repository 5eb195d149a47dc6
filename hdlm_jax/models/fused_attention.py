"""Attention kernels of accelerators, drawn from one description of who sees whom.

A `Sight` says which keys each row sees, as two runs that may differ from text to text; one predicate,
`visibility.sees_runs`, turns it into the mask of every backend:

- 'xla' on every platform: the reference of models/layouts.py, scores in float32, several softmax pieces;
- 'splash' on TPU: a Pallas kernel that never holds the scores and leaves out blocks that no row can see.
  The runs reach it as the kernel's row numbers, so that texts may differ at no cost;
- 'cudnn' on GPU: fused attention with a materialised mask;
- 'auto': 'splash' on TPU where it can be, else 'xla'. No GPU was measured, so there it is 'xla'.

Letters: B texts, R rows (queries and keys), H heads, D head size.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from hdlm_jax.diffusion.visibility import sees_runs
from hdlm_jax.errors import UserError
from hdlm_jax.models import devices
from hdlm_jax.models.attention import Attention

BLOCKS = (512, 256, 128)  # rows and keys per block of the splash kernel, the largest that divides
PACK = 1 << 15  # start and stop of a row's run travel as one int32


class Reach(NamedTuple):
    """What a row can see in some text: static, so that a kernel may leave the other blocks out.

    Rows 0..length-1 see what stands before them, and their group; rows length..2 length-1, a noised copy, see
    what stands before their window of the first copy and `width` rows around them of the second.
    """

    length: int
    width: int = 0
    group: int = 1

    def __call__(self, query, key):
        """Whether row `query` sees row `key` in some text; arguments broadcast."""
        row, other = query % self.length, key % self.length
        clean, noised = key < self.length, query >= self.length
        near = (other < row + self.width) & (row < other + self.width)
        settled = other // self.group <= row // self.group
        return (clean & ~noised & settled) | (clean & noised & (other < row)) | (~clean & noised & near)


class Sight(NamedTuple):
    """Row r of a text sees keys [0, start) and [offset + start, offset + stop).

    Attributes:
      start, stop: int32 [B, R].
      offset: static.
      reach: what any row can see at most.
    """

    start: Array
    stop: Array
    offset: int
    reach: Reach


def causal_sight(shape: tuple[int, int], group: int = 1) -> Sight:
    """[B, R] rows that each see what stands before them, themselves and their group (visibility.settled_sees)."""
    after_R = jnp.minimum((jnp.arange(shape[1]) // group + 1) * group, shape[1])
    after = jnp.broadcast_to(after_R[None, :], shape)
    return Sight(after, after, 0, Reach(shape[1], 0, group))


def tiled_sight(start_BxL: Array, stop_BxL: Array, width: int, group: int = 1) -> Sight:
    """A clean copy and a noised one whose rows lie in windows [start, stop), each at most `width` wide."""
    L, after = start_BxL.shape[1], causal_sight(start_BxL.shape, group).start
    both = lambda clean, noised: jnp.concatenate([clean, noised], 1)
    return Sight(both(after, start_BxL), both(after, stop_BxL), L, Reach(L, width, group))


def visible(sight: Sight) -> Array:
    """The whole mask, bool [B, R, R]."""
    key = jnp.arange(sight.start.shape[1])[None, None, :]
    return sees_runs(sight.start[:, :, None], sight.stop[:, :, None], sight.offset, key)


def attention(
    config, rows: int, sight: Sight | None, reference: Attention, obstacle: str = "", platform: str | None = None
) -> Attention:
    """The attention of `config.attention` over `rows` rows.

    Args:
      config: the network's sizes and switches.
      rows: R.
      sight: who sees whom; None: every row every row.
      reference: what 'xla' runs.
      obstacle: why only the reference can run this layout, or nothing.
      platform: 'tpu', 'gpu' or 'cpu' (default: that of the mesh, else JAX's).

    Raises:
      UserError: a kernel that cannot run here, with the reason.
    """
    name = resolve(config, rows, obstacle, platform or devices.platform())
    if name == "xla":
        return reference
    return splash(sight, rows) if name == "splash" else cudnn(sight)


def resolve(config, rows: int, obstacle: str, platform: str) -> str:
    """The backend that `config.attention` stands for.

    Raises:
      UserError: one that cannot run here, with the reason.
    """
    if config.attention == "auto":
        return "splash" if not _obstacle("splash", config, rows, obstacle, platform) else "xla"
    why = "" if config.attention == "xla" else _obstacle(config.attention, config, rows, obstacle, platform)
    if why:
        raise UserError(f"model.attention: got {config.attention!r}; allowed here: 'xla' or 'auto' ({why})")
    return config.attention


def _obstacle(name: str, config, rows: int, obstacle: str, platform: str) -> str:
    """Why backend `name` cannot run, or nothing."""
    wanted = {"splash": "tpu", "cudnn": "gpu"}[name]
    reasons = [
        (platform != wanted, f"{name} runs on a {wanted.upper()}, this is a {platform.upper()}"),
        (bool(obstacle), f"{name} cannot: {obstacle}"),
        (config.dropout > 0, f"{name} has no dropout of probabilities: model.dropout must be 0"),
        (name == "splash" and rows % BLOCKS[-1], f"splash takes rows in multiples of {BLOCKS[-1]}, not {rows}"),
        (name == "splash" and rows >= PACK, f"splash takes fewer than {PACK} rows, not {rows}"),
        (name == "cudnn" and config.dtype != "bfloat16", "cudnn needs model.dtype 'bfloat16'"),
        (name == "cudnn" and (rows % 2 or config.head_size % 8), "cudnn needs even rows and a head size of 8 n"),
        (name == "cudnn" and config.head_size > 128, "cudnn takes a head size of at most 128"),
    ]
    return next((text for holds, text in reasons if holds), "")


def splash(sight: Sight | None, rows: int, interpret: bool = False) -> Attention:
    """Attention by the splash kernel, each device on its own texts and heads.

    Args:
      interpret: run the kernel without a TPU (slow: for tests).
    """

    def attend(q, k, v, past, dropout):
        del past, dropout
        B, H, R, D = q.shape
        runs = jnp.zeros((B, 0), jnp.int32) if sight is None else sight.start * PACK + sight.stop
        here = devices.mesh()
        heads = H if here is None else H // here.shape[devices.HEADS]
        whom = (None, 0) if sight is None else (sight.reach, sight.offset)
        kernel = _kernel(*whom, rows, heads, interpret)
        many = jax.vmap(lambda runs, q, k, v: _with_runs(kernel, runs if runs.size else None)(q, k, v))
        if here is not None:
            texts, cut = P(devices.ROWS), P(devices.ROWS, devices.HEADS)
            many = jax.shard_map(many, in_specs=(texts, cut, cut, cut), out_specs=cut, check_vma=False)
        return many(runs, q * D**-0.5, k, v)

    return attend


def cudnn(sight: Sight | None, implementation: str = "cudnn") -> Attention:
    """Attention by cuDNN's fused kernel with a materialised mask.

    Args:
      implementation: 'xla' runs the same call on any platform, for tests.
    """

    def attend(q, k, v, past, dropout):
        del past, dropout
        mask = None if sight is None else visible(sight)[:, None]
        rows_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        out = jax.nn.dot_product_attention(*rows_first, mask=mask, implementation=implementation)
        return jnp.swapaxes(out, 1, 2)

    return attend


@functools.lru_cache(maxsize=32)
def _kernel(reach: Reach | None, offset: int, rows: int, heads: int, interpret: bool) -> Callable:
    """The splash kernel for one text; its row numbers are to be replaced by the text's runs."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    size = next(block for block in BLOCKS if rows % block == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = kernels.BlockSizes(**{f"block_{name}": size for name in names})
    mask = masks.FullMask((rows, rows)) if reach is None else _runs_mask(masks, reach, offset, rows)
    with jax.ensure_compile_time_eval():
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


def computed_share(reach: Reach | None, rows: int) -> float:
    """Share of the pairs of rows that the splash kernel computes: those of the blocks it does not leave out."""
    if reach is None:
        return 1.0
    size = next(block for block in BLOCKS if rows % block == 0)
    row = np.arange(rows)
    seen = reach(row[:, None], row[None, :]).reshape(rows // size, size, rows // size, size)
    return float(seen.any((1, 3)).mean())


def _runs_mask(masks, reach: Reach, offset: int, rows: int):
    """A mask whose blocks are those of `reach`, and whose rows see by their runs inside the kernel."""

    class Runs(masks._ComputableMask):
        def __getitem__(self, where):
            row = np.arange(rows)
            return reach(row[where[0]][:, None], row[where[1]][None, :])

        def __eq__(self, other):
            return self is other

        def __hash__(self):
            return id(self)

    return Runs((rows, rows), lambda runs, key: sees_runs(runs // PACK, runs % PACK, offset, key))


def _with_runs(kernel, runs_R: Array | None):
    """The kernel for the rows of one text."""
    if runs_R is None:
        return kernel
    place = lambda info: None if info is None else info._replace(q_sequence=runs_R)
    infos = (place(info) for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info))
    return type(kernel)(*infos, **kernel.kwargs)
