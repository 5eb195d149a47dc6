"""The forms in which a loaded model leaves the package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ml_collections import ConfigDict

from hdlm_jax import config as configs
from hdlm_jax.data.tokenizers import Tokenizer
from hdlm_jax.errors import choose
from hdlm_jax.interop import folders, huggingface, published, stablehlo
from hdlm_jax.models.parts import Parts
from hdlm_jax.training import weights_file


class Model(Protocol):
    """What is exported: an `hdlm_jax.lm.LanguageModel`."""

    config: ConfigDict
    parts: Parts
    params: dict
    tokenizer: Tokenizer
    step: int
    weights: str
    origin: published.Origin | None
    folder: Path | None


class Format(NamedTuple):
    """A form.

    Attributes:
      summary: for the help.
      write: (model, an empty folder) -> None.
    """

    summary: str
    write: Callable[[Model, Path], None]


def write_safetensors(model: Model, out: Path) -> None:
    """Our own layout: config.json, tokenizer files, model.safetensors; `hdlm_jax.load` opens the folder."""
    (out / "config.json").write_text(configs.to_json(model.config), encoding="utf-8")
    model.tokenizer.save(out)
    if model.origin is not None:
        published.keep(model.origin, out)
    params = weights_file.unpadded(model.params, model.parts.model.vocabulary)
    weights_file.write(out / weights_file.NAME, params, {"weights": model.weights, "step": str(model.step)})


def write_published(model: Model, out: Path) -> None:
    """The authors' layout: see `published.write`."""
    published.write(model.parts.model, model.config, model.params, model.tokenizer, model.origin, out)


def write_stablehlo(model: Model, out: Path) -> None:
    """Our own layout with the denoiser and the sampler as programs: see `stablehlo.write`."""
    write_safetensors(model, out)
    stablehlo.write(model.parts, model.config.sampler, model.params, out)


FORMATS: Mapping[str, Format] = {
    "safetensors": Format("our own layout, which hdlm opens like a run folder", write_safetensors),
    "published": Format("the layout of the authors' checkpoints, which their code opens", write_published),
    "huggingface": Format("PyTorch files, weights, tokenizer and card, which transformers opens", huggingface.write),
    "stablehlo": Format("our own layout with denoiser and sampler as programs that need jax alone", write_stablehlo),
}


def export(model: Any, out: str | Path, format: str = "safetensors") -> None:
    """Writes a loaded model as a new folder, which appears whole or not at all.

    Args:
      model: the loaded model.
      out: a new or empty folder.
      format: one of `FORMATS`.

    Raises:
      UserError: an unknown format, one that does not fit the model, a folder that is not free.
    """
    form = choose("--format", format, FORMATS)
    with folders.whole(Path(out), "OUT") as partial:
        form.write(model, partial)
