"""The loaded model: generate, stream, correct, perplexity, logits.

>>> import hdlm_jax as hdlm                                        # doctest: +SKIP
>>> lm = hdlm.load("runs/quickstart")                              # doctest: +SKIP
>>> lm.generate(prompt="def ", num_samples=4, seed=0).texts        # doctest: +SKIP
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hdlm_jax import config as configs
from hdlm_jax import files
from hdlm_jax.data import pipeline, prepare, tokenizers
from hdlm_jax.diffusion import hyperschedules, samplers
from hdlm_jax.diffusion.hyperschedules import Hyperschedule
from hdlm_jax.errors import require
from hdlm_jax.evaluation import perplexity
from hdlm_jax.evaluation.perplexity import Bound
from hdlm_jax.generation import continuation, sampling, self_correction, streaming
from hdlm_jax.generation.chain import Chain
from hdlm_jax.generation.sampling import Generation
from hdlm_jax.generation.self_correction import Correction
from hdlm_jax.generation.streaming import Snapshot
from hdlm_jax.interop import export, published
from hdlm_jax.models import layouts
from hdlm_jax.models import parts as builders
from hdlm_jax.models.transformer import TransformerConfig, forward, init, logits
from hdlm_jax.training import distributed, run_folder, sharding, weights_file

HYPERSCHEDULE_FIELDS = ("width", "rate", "block", "steps")
PREFIX_IS_BLIND = (
    "fixed: this prefix model sees a fixed text to the right of a position only inside their common window; a full"
    " model sees it always"
)


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A trained model with its experiment and tokenizer; see `load`.

    Attributes:
      config: the experiment.
      parts: its parts.
      params: the weights.
      tokenizer: of its vocabulary.
      step: that the weights are of.
      weights: 'ema' or 'raw'.
      origin: what an imported run keeps of the published checkpoint; None for our own.
      folder: that it was opened from; None where it was made in memory.
      mesh: of the devices that the weights lie on; None for one device. Bounds use all of it.
    """

    config: ConfigDict
    parts: builders.Parts
    params: dict
    tokenizer: tokenizers.Tokenizer
    step: int
    weights: str = "ema"
    origin: published.Origin | None = None
    folder: Path | None = None
    mesh: Mesh | None = None

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        num_samples: int = 1,
        length: int | None = None,
        seed: int | Sequence[int] = 0,
        fixed: Mapping[int, str] | None = None,
        stop: bool = False,
        forbid: Sequence[int] = (),
        hook: Callable[[Array, Array], Array] | None = None,
        record: bool | int = False,
        hyperschedule: str | Hyperschedule | None = None,
        sampler: str | None = None,
        **dials: Any,
    ) -> Generation:
        """Generates texts.

        Args:
          prompt: a text for all samples, or one text per sample, of any lengths; None begins from nothing.
          num_samples: how many texts (for a single prompt).
          length: tokens in all, prompt included; default: the trained length. A prefix model under quenched, block,
            slide or block_slide goes on past it, each further part after the last half of what there is.
          seed: of the draws; the same seed gives the same texts. Or one seed per text, which then is the same alone
            and in any batch.
          fixed: position -> text whose tokens stand there in all texts, to fill in what lies between. Rows of a
            `prefix` model see a fixed text to their right only inside their window; a `full` model sees it always.
          stop: texts end at their first generated end of text (`lengths`), and calls end when all texts have.
          forbid: token ids that are never drawn.
          hook: (logits_BxWxN, x_BxL) -> logits_BxWxN, a pure JAX function, before all other shaping.
          record: keep the trajectory, with at most so many frames where a number is given.
          hyperschedule: a kind (with `width`, `rate`, `block`, `steps` among the dials) or a `Hyperschedule`;
            default: the experiment's.
          sampler: a name in `hdlm_jax.diffusion.samplers.SAMPLERS`; default: the experiment's.
          **dials: eta, temperature, top_p, top_k, guidance, repetition_penalty, steps, width, rate, block, and the
            other fields of the experiment's `sampler` block.

        Raises:
          UserError: an unknown name, a dial out of range or of another sampler, a prompt that is empty or too long, a
            hyperschedule that this model cannot sample exactly, guidance of a prefix model.
        """
        c, prompts = self._with_dials(sampler, dials), _prompts(prompt, num_samples)
        trained = self.parts.model.length
        length = trained if length is None else length
        require(length >= 1, "length", length, "a positive integer")
        hs = self._hyperschedule(c, hyperschedule, dials, min(length, trained))
        chain = self._chain(c, hs, stop, forbid, hook)
        if length <= trained:
            out = sampling.draw(chain, self.params, self.tokenizer, prompts, length, seed, record, fixed)
        else:
            continuation.check(self.parts, hs, length, fixed, record)
            further = self._hyperschedule(c, hyperschedule, dials, continuation.stride(trained))
            chains = chain, self._chain(c, further, stop, forbid, hook)
            out = continuation.draw(*chains, self.params, self.tokenizer, prompts, length, seed)
        blind = bool(fixed) and self.parts.model.visibility == "prefix"
        return dataclasses.replace(out, notes=(PREFIX_IS_BLIND,)) if blind else out

    def watch(
        self,
        prompt: str | None = None,
        *,
        every: int = 1,
        length: int | None = None,
        seed: int = 0,
        fixed: Mapping[int, str] | None = None,
        stop: bool = False,
        hyperschedule: str | Hyperschedule | None = None,
        sampler: str | None = None,
        **dials: Any,
    ) -> Iterator[Snapshot]:
        """Generates one text and yields it at first and after every so many calls; arguments as of `generate`.

        The finished text is that of `generate` with the same settings, up to the rounding of scores.

        Args:
          every: calls between two snapshots.

        Raises:
          UserError: as `generate`; a length past the trained one.
        """
        c, prompts = self._with_dials(sampler, dials), _prompts(prompt, 1)
        trained = self.parts.model.length
        length = trained if length is None else length
        require(1 <= length <= trained, "length", length, f"1 .. {trained}, the trained length")
        require(every >= 1, "every", every, "a positive number of calls")
        chain = self._chain(c, self._hyperschedule(c, hyperschedule, dials, length), stop, (), None)
        return streaming.snapshots(chain, self.params, self.tokenizer, prompts[0], length, seed, every, fixed)

    def stream(self, prompt: str | None = None, *, every: int = 1, **settings: Any) -> Iterator[str]:
        """Generates one text and yields it piece by piece as its tokens settle, from left to right.

        The pieces join to the text of `generate` with the same settings. Where all positions settle together (flat),
        there is one piece.

        Args:
          prompt: the text begins with it; it is the first piece.
          every: calls between two pieces.
          **settings: as of `watch`.
        """
        return streaming.settled_text(self.watch(prompt, every=every, **settings), self.tokenizer)

    def correct(
        self,
        text: str | np.ndarray,
        *,
        seed: int | Sequence[int] = 0,
        temperature: float = 0.1,
        noise: float = 0.01,
        patience: int = 32,
    ) -> Correction:
        """Replaces tokens of finished texts by surer ones, one at a time: see `generation.self_correction`.

        Args:
          text: a text, or tokens int32 [B, L] (of `generate`, say).
          seed: of the draws, or one seed per text.
          temperature, noise, patience: see `self_correction.correct`.

        Raises:
          UserError: a model that says nothing of finished texts, a text that is empty or longer than the trained
            length, a value out of range.
        """
        dials = {"temperature": temperature, "noise": noise, "patience": patience}
        return self_correction.of_text(self.parts, self.params, self.tokenizer, text, seed, **dials)

    def perplexity(
        self,
        text_or_path: str | Path,
        draws: int = 4,
        seed: int = 0,
        batch: int = 32,
        *,
        eta: float | None = None,
        exact: bool = False,
    ) -> Bound:
        """The bound on a text, or on the file of that name: see `evaluation.perplexity.Bound`.

        Args:
          text_or_path: what to evaluate.
          draws: of the noise of every window.
          seed: of the noise.
          batch: windows at a time.
          eta: bound the chain that adaptive correction runs at this strength (epsilon-hybrid models), flat
            in sampler.steps steps; None bounds the model's own reverse chain.
          exact: take every step once instead of drawing steps (`evaluation.perplexity.every_step`).

        Raises:
          UserError: an empty or binary file, no text, fewer than two draws, an eta or an exact bound that this
            model does not have.
        """
        text = _read(text_or_path)
        windows = pipeline.windows_of_text(text, self.tokenizer, self.parts.model.length)
        tokens = int(windows.valid.sum())
        rows = _batches(windows.tokens, windows.valid, batch, self.mesh)
        return self._bound(rows, windows.num_bytes / tokens, draws, seed, eta, exact)

    def held_out(
        self,
        folder: str | Path,
        draws: int = 4,
        seed: int = 0,
        batch: int = 32,
        windows: int = 0,
        *,
        eta: float | None = None,
        exact: bool = False,
    ) -> tuple[Bound, float]:
        """The bound on the held-out split of a run folder, and the unigram byte model's bits per byte.

        Args:
          folder: the run folder whose data to read.
          windows: only the first so many; 0 takes all.
          draws, seed, batch, eta, exact: as in `perplexity`.

        Raises:
          UserError: an imported model, which has no data of its own; a negative number of windows.
        """
        tokens, manifest = self.held_out_windows(folder, windows)
        split = manifest["splits"]["held_out"]
        rows = _batches(tokens, np.ones(tokens.shape, bool), batch, self.mesh)
        bound = self._bound(rows, split["bytes"] / split["tokens"], draws, seed, eta, exact)
        return bound, manifest["unigram_bits_per_byte"]

    def held_out_windows(self, folder: str | Path, windows: int = 0) -> tuple[np.ndarray, dict]:
        """Held-out windows of a run folder, int32 [windows, L], and the manifest of its data.

        Args:
          folder: the run folder whose data to read.
          windows: only the first so many; 0 takes all.

        Raises:
          UserError: an imported model, which has no data of its own; a negative number of windows.
        """
        has_data = self.origin is None
        require(has_data, "--text", None, "a file: an imported model has no held-out split of its own")
        place = files.place(folder) / "data"
        data = distributed.writer_first(lambda: prepare.open_or_prepare(self.config.data.to_dict(), place))
        require(windows >= 0, "--windows", windows, "0 (all) or a positive integer")
        count = min(windows or len(data.held_out), len(data.held_out))
        return np.stack([data.held_out[i] for i in range(count)]), data.manifest

    def _bound(self, rows, bytes_per_token: float, draws: int, seed: int, eta: float | None, exact: bool) -> Bound:
        parts = self.parts if eta is None else perplexity.in_steps(self.parts)
        enumerated = perplexity.every_step(parts) if exact else perplexity.NOTHING
        draw = perplexity.estimator(parts, self.parts.loss.reading, eta, exact)
        draw = draw if self.mesh is None else sharding.over_rows(self.mesh, draw)
        name = perplexity.name_of(parts, eta)
        return perplexity.estimate(draw, self.params, rows, bytes_per_token, draws, seed, name, enumerated)

    def logits(self, tokens_BxL: Array, sigma: Array | None = None) -> Array:
        """Scores float32 [B, L, V] for every position, every row seeing every row.

        Of our models: row i predicts token i, -inf at the mask. Of an imported model, what the authors' forward
        pass returns (`interop.published.outputs`): row i reads token i, and so predicts token i + 1 where the model
        is shifted; the mask's column is that of the weights; a gamma model gives log-scores, less
        log(e^sigma - 1) and log N.

        Args:
          tokens_BxL: int32, ordinary tokens or the mask.
          sigma: [B, L] noise levels, for conditioned models only.

        Raises:
          UserError: more tokens than the trained length; no noise levels for a conditioned model.
        """
        model = self.parts.model
        L = tokens_BxL.shape[1]
        require(model.length >= L, "tokens", f"{L} positions", f"at most {model.length}, the trained length")
        if model.conditioning:
            require(sigma is not None, "sigma", sigma, "noise levels [B, L]: this model is conditioned on them")
        sigma = jnp.asarray(sigma) if model.conditioning else None
        if self.origin is not None:
            return published.outputs(model, self.params, jnp.asarray(tokens_BxL), sigma)
        clean = float(self.parts.schedule.sigma(jnp.ones(())))
        return _scores(model, clean, self.params, jnp.asarray(tokens_BxL), sigma)

    def export(self, folder: str | Path, format: str = "safetensors") -> None:
        """Writes the weights in another form as a new folder; see `hdlm export`.

        Args:
          folder: new or empty.
          format: a name in `hdlm_jax.interop.export.FORMATS`.

        Raises:
          UserError: an unknown format, one that does not fit the model, a folder that is not free.
        """
        export.export(self, folder, format)

    def _with_dials(self, sampler: str | None, dials: dict) -> ConfigDict:
        c = configs.from_json(configs.to_json(self.config))
        names = {name for name in c.sampler if name != "kind"} | set(HYPERSCHEDULE_FIELDS)
        for name in dials:
            if name not in names:
                raise configs.unknown("generate", name, names)
        given = {name: value for name, value in dials.items() if name in c.sampler and value is not None}
        if sampler is not None and sampler != c.sampler.kind:  # the experiment's dials are those of its own sampler
            given = {name: None for name in samplers.DIALS if name != "eta"} | given | {"kind": sampler}
        c = configs.override(c, {f"sampler.{name}": value for name, value in given.items()})
        has_eta = "eta" not in given or "eta" in samplers.dials_of(c.sampler.kind)
        require(has_eta, "sampler.eta", given.get("eta"), f"nothing for {c.sampler.kind!r}, which has no such dial")
        return c

    def _chain(self, c: ConfigDict, hs: Hyperschedule, stop: bool, forbid: Sequence[int], hook) -> Chain:
        end = self.tokenizer.end_of_text if stop else None
        return sampling.chain(self.parts, hs, c.sampler, end, forbid, hook)

    def _hyperschedule(self, c: ConfigDict, given, dials: dict, length: int) -> Hyperschedule:
        dials = {name: dials[name] for name in HYPERSCHEDULE_FIELDS if dials.get(name) is not None}
        if isinstance(given, Hyperschedule):
            require(given.length == length, "hyperschedule.length", given.length, f"{length}, the text's length")
            require(not dials, ", ".join(dials), list(dials.values()), f"nothing beside {given!r}, which is complete")
            return given
        trained, fields = configs.block_fields(c.hyperschedule)
        kind = given or trained
        fields = (fields if kind == trained else {}) | dials
        if kind in ("flat", "ar_diffusion"):
            fields.setdefault("steps", c.sampler.steps)
        return hyperschedules.build(kind, length, **fields)


def load(folder: str | Path, weights: str = "ema", mesh: Mesh | None = None) -> LanguageModel:
    """Opens a run folder, or an exported one.

    Args:
      folder: written by `hdlm train`, `hdlm import` or `hdlm export --format safetensors`.
      weights: 'ema', the running mean, or 'raw', the last ones. Where only one kind is kept, 'ema' gives that.
      mesh: devices to cut the weights over, also those of several processes (`training.sharding.mesh`).

    Raises:
      UserError: no run folder, no checkpoint in it, weights that do not fit the experiment.
    """
    folder = files.place(folder, "run folder")
    config = run_folder.read_config(folder)
    tokenizer = tokenizers.load(folder)
    parts = builders.build(config, tokenizer.num_tokens, tokenizer.bos_id)
    abstract = jax.eval_shape(lambda: init(parts.model, jax.random.key(0)))
    abstract = abstract if mesh is None else sharding.placed(mesh, abstract)
    found = weights_file.restore(folder, abstract, parts.model.vocabulary, weights)
    params, origin = jax.tree.map(_on_devices, found.params, abstract), published.kept(folder)
    return LanguageModel(config, parts, params, tokenizer, found.step, found.kind, origin, folder, mesh)


def _on_devices(x: np.ndarray | Array, wanted: jax.ShapeDtypeStruct) -> Array:
    if isinstance(x, Array):
        return x
    return jnp.asarray(x) if wanted.sharding is None else jax.device_put(x, wanted.sharding)


def _prompts(prompt: str | Sequence[str] | None, num_samples: int) -> list[str]:
    require(num_samples >= 1, "num_samples", num_samples, "a positive integer")
    require(prompt != "", "prompt", prompt, "a text; leave it out to begin from nothing")
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""] * num_samples
    return list(prompt)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores(model: TransformerConfig, clean: float, params: dict, tokens_BxL: Array, sigma_BxL: Array | None) -> Array:
    rows = layouts.whole_window(model, tokens_BxL)
    sigma_BxR = None if sigma_BxL is None else layouts.held(model, sigma_BxL, rows.tokens.shape[1], clean)
    hidden, _ = forward(model, params, rows.tokens, rows.positions, rows.attention, sigma_BxR=sigma_BxR)
    return logits(model, params, hidden[:, : tokens_BxL.shape[1]])


def _read(text_or_path: str | Path) -> str:
    from hdlm_jax.data.corpora import read_text

    is_file = isinstance(text_or_path, Path) or os.path.isfile(text_or_path)  # False for text too long for a name
    return read_text(str(text_or_path), "text") if is_file else str(text_or_path)


def _batches(tokens, valid, batch: int, mesh: Mesh | None):
    """Equal batches of windows, the last one filled with rows that do not count."""
    require(batch >= 1, "batch", batch, "a positive integer")
    batch = min(batch, len(tokens)) if mesh is None else sharding.whole_rows(mesh, min(batch, len(tokens)))
    for first in range(0, len(tokens), batch):
        rows = np.arange(first, first + batch)
        inside = rows < len(tokens)
        rows = np.where(inside, rows, 0)
        yield tokens[rows], valid[rows] & inside[:, None]
