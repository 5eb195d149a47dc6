"""What generations look like in a notebook: their texts, and the first one's steps to scrub through."""

import html as markup
from collections.abc import Callable, Sequence

from hdlm_jax.generation.trajectory import Trajectory
from hdlm_jax.visual import trajectory_html

_BOX = "border:1px solid #8885;border-radius:8px"
_TEXT = f"{_BOX};margin:0 0 8px;padding:8px 12px;white-space:pre-wrap;overflow-wrap:anywhere"
_FRAME = f"{_BOX};width:100%;height:640px"


def generation_html(
    texts: Sequence[str],
    trajectory: Trajectory | None = None,
    texts_of: Callable[[int], str] = str,
    title: str = "",
) -> str:
    """Texts one under the other, and below them the page of the first one's trajectory where there is one.

    Args:
      texts: what was generated.
      trajectory: of the same texts.
      texts_of: token id -> its text, for the trajectory; by default the ids are shown.
      title: over it all.

    >>> "a &lt; b" in generation_html(["a < b"])
    True
    """
    parts = [f"<p><b>{markup.escape(title)}</b></p>"] if title else []
    parts += [f'<pre style="{_TEXT}">{markup.escape(text)}</pre>' for text in texts]
    if trajectory is not None:
        page = markup.escape(trajectory_html.html(trajectory, texts_of, title=title or "The first text, step by step"))
        parts.append(f'<iframe style="{_FRAME}" title="The first text, step by step" srcdoc="{page}"></iframe>')
    return f"<div>{''.join(parts)}</div>"
