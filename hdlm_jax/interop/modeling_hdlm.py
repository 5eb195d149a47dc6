# Exported modeling file: `hdlm export --format huggingface` puts a copy of it beside the weights.
"""The network of an exported hdlm_jax model in PyTorch, and its `generate`.

Rows are named by the token they predict. Row r of an aligned model holds token r; row r of a shifted model holds token
r - 1, BOS for r = 0, at rotary position r - 1. In a `prefix` model settled rows see settled rows up to themselves, the
rows of the window see the settled ones before it and one another, and nobody sees what lies behind it.

Letters: B texts, L positions, R rows (L, or L + 1 with the row behind the last token), D width, H heads, N ordinary
tokens, V = N + 1 with the mask.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_hdlm import HDLMConfig
from .generation_hdlm import generate

SINUSOIDS = 256  # features of the noise-level embedding


class Norm(nn.Module):
    """LayerNorm with weight only, computed in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        """x in its own dtype."""
        return F.layer_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-5).to(x.dtype)


class VocabEmbed(nn.Module):
    """The rows of the V tokens."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.mask, self.drift = config.mask_token_id, config.interpolation

    def forward(self, tokens, sigma=None):
        """[B, R, D]; with a drift g: e^{-g sigma} E[token] + (1 - e^{-g sigma}) E[mask]."""
        x = self.embedding[tokens]
        if not self.drift:
            return x
        stay = torch.exp(-self.drift * sigma)[..., None]
        return (stay * x + (1 - stay) * self.embedding[self.mask]).to(x.dtype)


class SigmaMap(nn.Module):
    """The noise-level embedding [B, R, C]."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, sigma):
        """Of noise levels [B, R]."""
        half = SINUSOIDS // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=sigma.device) / half)
        angles = sigma.float()[..., None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the stream."""

    def __init__(self, config):
        super().__init__()
        D, self.heads = config.hidden_size, config.num_attention_heads
        self.norm1, self.norm2 = Norm(D), Norm(D)
        self.attn_qkv = nn.Linear(D, 3 * D, bias=False)
        self.attn_out = nn.Linear(D, D, bias=False)
        wide = config.mlp_ratio * D
        self.mlp = nn.Sequential(nn.Linear(D, wide), nn.GELU(approximate="tanh"), nn.Linear(wide, D))
        self.adaLN_modulation = nn.Linear(config.conditioning, 6 * D) if config.conditioning else None

    def forward(self, x, rotary, visible, condition):
        """x [B, R, D]; visible bool [B, 1, R, R] or None; condition [B, R, C] or None."""
        shift_a = scale_a = gate_a = shift_m = scale_m = gate_m = None
        if condition is not None:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, -1)
        B, R, D = x.shape
        h = _modulated(self.norm1(x), shift_a, scale_a)
        q, k, v = self.attn_qkv(h).view(B, R, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(_rotated(q, *rotary), _rotated(k, *rotary), v, attn_mask=visible)
        x = x + _gated(self.attn_out(out.transpose(1, 2).reshape(B, R, D)), gate_a)
        return x + _gated(self.mlp(_modulated(self.norm2(x), shift_m, scale_m)), gate_m)


def _rotated(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def _modulated(x, shift, scale):
    return x if shift is None else (x * (1 + scale) + shift).to(x.dtype)


def _gated(branch, gate):
    return branch if gate is None else (gate * branch).to(branch.dtype)


class OutputLayer(nn.Module):
    """The last norm and the head."""

    def __init__(self, config):
        super().__init__()
        self.norm_final = Norm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x):
        """Float32 scores [..., V]; -inf at the mask, which is never predicted."""
        scores = self.linear(self.norm_final(x)).float()
        return torch.cat([scores[..., :-1], torch.full_like(scores[..., -1:], -math.inf)], -1)


class HDLMModel(PreTrainedModel, GenerationMixin):
    """Scores of every token of a text, and texts."""

    config_class = HDLMConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]

    def __init__(self, config):
        super().__init__(config)
        self.vocab_embed = VocabEmbed(config)
        self.sigma_map = SigmaMap(config.conditioning) if config.conditioning else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.output_layer = OutputLayer(config)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, VocabEmbed):
            nn.init.normal_(module.embedding, std=0.02)
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self):
        """The module of the vocabulary's rows."""
        return self.vocab_embed

    def get_output_embeddings(self):
        """The head."""
        return self.output_layer.linear

    def forward(self, input_ids, sigma=None, start=None, stop=None, return_dict=None, **kwargs):
        """Scores of every token, the mask's -inf: `.logits`, float32 [B, L, V]; row i is of token i.

        Args:
          input_ids: [B, L], ordinary tokens or the mask.
          sigma: [B, L] noise level (-log of the survival) of each token; needed iff the network is conditioned.
          start, stop: [B], the window of a `prefix` model; without them the whole text is one window.
          return_dict: False gives a tuple.
        """
        logits = self.output_layer(self.rows(input_ids, sigma, start, stop))
        return (logits,) if return_dict is False else MaskedLMOutput(logits=logits)

    def rows(self, input_ids, sigma=None, start=None, stop=None, trailing=True):
        """Hidden rows [B, L, D] before the last norm; arguments as `forward`.

        Args:
          trailing: whether a shifted `prefix` model has the row behind its window's last token.
        """
        c = self.config
        B, L = input_ids.shape
        if c.max_position_embeddings < L:
            raise ValueError(f"input_ids: got {L} positions; allowed: at most {c.max_position_embeddings}")
        if c.conditioning and sigma is None:
            raise ValueError("sigma: got None; allowed: noise levels [B, L], which this network is conditioned on")
        shifted = c.prediction == "shifted"
        more = int(shifted and (trailing or c.visibility == "full"))
        R, device = L + more, input_ids.device
        if shifted:
            input_ids = F.pad(input_ids, (1, 0), value=c.bos_token_id)[:, :R]
        condition = levels = None
        if c.conditioning:
            levels = sigma.to(device).float()
            levels = F.pad(levels, (1, 0), value=c.sigma_range[0])[:, :R] if shifted else levels  # BOS is clean
            condition = F.silu(self.sigma_map(levels))
        x = self.vocab_embed(input_ids, levels)
        row, visible = torch.arange(R, device=device), None
        if c.visibility == "prefix" and start is not None:
            begin, end = (torch.as_tensor(bound, device=device).view(-1, 1, 1) for bound in (start, stop))
            visible = seen(row[:, None], row[None, :], begin, end + more, c.context_group)[:, None]
        rotary = self._rotary(row - int(shifted))
        for block in self.blocks:
            x = block(x, rotary, visible, condition)
        return x[:, :L]

    def _rotary(self, position):
        size = self.config.hidden_size // self.config.num_attention_heads
        exponent = torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size
        angles = position.float()[:, None] * self.config.rotary_base**-exponent
        return angles.cos(), angles.sin()

    @torch.no_grad()
    def generate(self, input_ids=None, attention_mask=None, **settings):
        """Finished texts; see `generation_hdlm.generate`."""
        return generate(self, input_ids, attention_mask, **settings)


def seen(query, key, start, stop, group):
    """Whether row `query` sees row `key` when the window is [start, stop)."""
    settled = (query < start) & (key < start) & (key // group <= query // group)
    active = (query >= start) & (query < stop) & (key < stop)
    return settled | active | (query == key)
