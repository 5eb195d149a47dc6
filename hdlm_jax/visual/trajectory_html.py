"""A generation as one HTML page: a step scrubber over its tokens, in step with the hyperschedule's levels.

The page holds everything that it shows and asks nothing of the network (its content policy forbids it). What
differs from page to page, but for the two lines on top, lies in one block of base64, which no token's text can
break: a little-endian uint32 n, n bytes of JSON, then the arrays [F, L] that the JSON names, as differences between
frames, one plane for each byte, all of it deflated. trajectory.js reads it.
"""

import base64
import html as markup
import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import numpy as np

from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.diffusion.hyperschedules import ACTIVE, SETTLED, WORTHLESS
from hdlm_jax.errors import require
from hdlm_jax.files import write_whole
from hdlm_jax.generation.trajectory import Trajectory
from hdlm_jax.visual.figures import LEVEL_COLORS
from hdlm_jax.visual.token_texts import token_texts, visible

GIVEN = 3  # a fourth state beside SETTLED, ACTIVE and WORTHLESS
UNKNOWN = 101  # a confidence in percent that is not known
MAX_BYTES = 1_000_000
_WIDEST_MASK = 6.0  # characters
_FIRST = "The first text, step by step"
_BOX = "border:1px solid #8885;border-radius:8px"
_TEXT = f"{_BOX};margin:0 0 8px;padding:8px 12px;white-space:pre-wrap;overflow-wrap:anywhere"
_FRAME = f"{_BOX};width:100%;height:640px"


def html(trajectory: Trajectory, texts_of: Callable[[int], str], text: int = 0, title: str = "") -> str:
    """One text of a trajectory as a page of its own, under 1 MB.

    Args:
      trajectory: F frames of B texts of L tokens.
      texts_of: token id -> its text (`token_texts.token_texts` of a tokenizer); not asked for the mask.
      text: which of the B.
      title: of the page.

    Returns:
      The page. Where all frames do not fit into 1 MB, every second one, or fourth, .. and the last.

    Raises:
      UserError: no such text.

    References:
      The states are those of `Hyperschedule.regions`, corrections those of `Trajectory.corrected`.
    """
    batch = trajectory.tokens.shape[1]
    require(0 <= text < batch, "text", text, f"0 .. {batch - 1}")
    title = title or f"Text {text}"
    frames_F = np.arange(len(trajectory.steps))
    page = _page(trajectory, texts_of, text, title, frames_F)
    while len(page.encode()) > MAX_BYTES and len(frames_F) > 2:
        frames_F = np.unique([*frames_F[::2], frames_F[-1]])
        page = _page(trajectory, texts_of, text, title, frames_F)
    return page


def generation_html(
    texts: Sequence[str],
    trajectory: Trajectory | None = None,
    tokenizer: Tokenizer | None = None,
    title: str = "",
) -> str:
    """What a notebook shows of a generation: its texts, and the page of the first one where there is a trajectory.

    Args:
      texts: what was generated.
      trajectory: of the same texts.
      tokenizer: of the trajectory's tokens; without one their ids are shown.
      title: over it all.

    >>> "a &lt; b" in generation_html(["a < b"])
    True
    """
    parts = [f"<p><b>{markup.escape(title)}</b></p>"] if title else []
    parts += [f'<pre style="{_TEXT}">{markup.escape(text)}</pre>' for text in texts]
    if trajectory is not None:
        page = html(trajectory, str if tokenizer is None else token_texts(tokenizer), title=title or _FIRST)
        parts.append(f'<iframe style="{_FRAME}" title="{_FIRST}" srcdoc="{markup.escape(page)}"></iframe>')
    return f"<div>{''.join(parts)}</div>"


def save(page: str, path: str | os.PathLike) -> Path:
    """Writes a page whole or not at all; folders on the way are made.

    Raises:
      UserError: when the suffix is not .html, or the file cannot be written.
    """
    path = checked(path)
    write_whole(path, page)
    return path


def checked(path: str | os.PathLike) -> Path:
    """The path of a page; `UserError` unless it ends in .html."""
    path = Path(path)
    require(path.suffix == ".html", "out", str(path), "a file name ending in .html")
    return path


def states(trajectory: Trajectory, text: int) -> np.ndarray:
    """int [F, L]: SETTLED, ACTIVE, WORTHLESS (in the call that follows each frame) or GIVEN."""
    hs, origin = trajectory.hyperschedule, int(trajectory.origins[text])
    position_L = np.arange(trajectory.tokens.shape[2]) - origin
    next_level_FxL = hs.level_of(position_L[None, :], trajectory.steps[:, None] + 1)
    begun_FxL = np.where(next_level_FxL < hs.tau_max, ACTIVE, WORTHLESS)
    state_FxL = np.where(trajectory.levels()[:, text] == 0, SETTLED, begun_FxL)
    return np.where(trajectory.given[text], GIVEN, state_FxL)


def _page(trajectory: Trajectory, texts_of: Callable[[int], str], text: int, title: str, frames_F: np.ndarray) -> str:
    template, style, script = (
        resources.files(__package__).joinpath(f"trajectory.{suffix}").read_text(encoding="utf-8")
        for suffix in ("html", "css", "js")
    )
    parts = {
        "title": markup.escape(title),
        "schedule": markup.escape(trajectory.hyperschedule.describe()),
        "style": style,
        "data": _packed(trajectory, texts_of, text, frames_F),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _packed(trajectory: Trajectory, texts_of: Callable[[int], str], text: int, frames_F: np.ndarray) -> str:
    token_FxL = trajectory.tokens[frames_F, text]
    ids, place_FxL = np.unique(token_FxL, return_inverse=True)  # of the vocabulary, what occurs
    mask = -1 if trajectory.mask is None or trajectory.mask not in ids else int(np.searchsorted(ids, trajectory.mask))
    texts = ["" if i == mask else visible(texts_of(int(token))) for i, token in enumerate(ids)]
    percent_FxL = np.nan_to_num(np.round(100 * trajectory.confidence[frames_F, text]), nan=UNKNOWN)
    arrays = {
        "tokens": place_FxL.reshape(token_FxL.shape),
        "confidence": percent_FxL.astype(int),
        "levels": trajectory.levels()[frames_F, text],
        "states": states(trajectory, text)[frames_F],
    }
    planes = {name: _planes(array_FxL) for name, array_FxL in arrays.items()}
    width = np.mean([len(texts[i]) for i in arrays["tokens"][-1]])
    header = {
        "length": token_FxL.shape[1],
        "steps": trajectory.steps[frames_F].tolist(),
        "windows": trajectory.windows()[frames_F, text].tolist(),
        "tau_max": trajectory.hyperschedule.tau_max,
        "texts": texts,
        "mask": mask,
        "mask_width": round(min(max(float(width), 1.0), _WIDEST_MASK), 2),  # so that little moves as tokens come
        "scale": LEVEL_COLORS,
        "arrays": [[name, len(of)] for name, of in planes.items()],
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    body = b"".join(plane.tobytes() for of in planes.values() for plane in of)
    return base64.b64encode(zlib.compress(len(head).to_bytes(4, "little") + head + body, 9)).decode()


def _planes(array_FxL: np.ndarray) -> list[np.ndarray]:
    """The bytes of the differences between frames, lowest first: uint8 [F, L] each; they wrap around.

    >>> [plane.tolist() for plane in _planes(np.array([[1, 300], [0, 301]]))]
    [[[1, 44], [255, 1]], [[0, 1], [255, 0]]]
    """
    difference_FxL = np.diff(array_FxL.astype(np.int64), axis=0, prepend=0)
    count = max(1, -(-int(array_FxL.max()).bit_length() // 8))
    return [(difference_FxL >> 8 * plane & 255).astype(np.uint8) for plane in range(count)]
