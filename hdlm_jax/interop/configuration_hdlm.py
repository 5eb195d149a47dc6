# Exported modeling file: `hdlm export --format huggingface` puts a copy of it beside the weights.
"""The configuration of an exported hdlm_jax model."""

from transformers import PretrainedConfig


class HDLMConfig(PretrainedConfig):
    """Sizes of the network, and the noise and hyperschedule that it was trained under.

    Args:
      num_tokens: N, ordinary tokens; the mask is token N, and the vocabulary has N + 1.
      hidden_size, num_hidden_layers, num_attention_heads, mlp_ratio: sizes.
      max_position_embeddings: L, the longest text.
      prediction: 'aligned' (row i holds token i and predicts it) or 'shifted' (row i holds token i - 1, row 0 BOS).
      visibility: 'full' (every row sees every row) or 'prefix' (settled rows causal, a window sees them and itself).
      context_group: settled rows see whole groups of so many; 1 is causal.
      inexact_context: whether groups may lie across windows.
      window_width: the widest window of training.
      conditioning: width of the noise-level embedding; 0: the network does not see the noise level.
      interpolation: drift of the input embedding to the mask's.
      rotary_base: of the rotary positions.
      sigma_range: `generate` clips noise levels to it.
      noise_schedule: kind and fields; noise fraction -> survival alpha.
      noising: kind and fields of the process that turned text to noise.
      alpha_max: survival at the least noise there is.
      epsilon: share of random tokens among the unmasked ones.
      reading: how the network is read at tokens: 'posterior', 'cavity' or 'hybrid'.
      hyperschedule: kind and fields.
      generates: whether `generate` knows the way back of this process.
      learned_corrections: whether training showed the network tokens to correct.
    """

    model_type = "hdlm"

    def __init__(
        self,
        num_tokens=257,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        mlp_ratio=4,
        max_position_embeddings=128,
        prediction="aligned",
        visibility="full",
        context_group=1,
        inexact_context=False,
        window_width=None,
        conditioning=0,
        interpolation=0.0,
        rotary_base=10_000.0,
        sigma_range=(1e-4, 9.21034037),
        noise_schedule=None,
        noising=None,
        alpha_max=1.0,
        epsilon=0.0,
        reading="posterior",
        hyperschedule=None,
        generates=True,
        learned_corrections=False,
        bos_token_id=256,
        **kwargs,
    ):
        kwargs.pop("vocab_size", None)
        kwargs.setdefault("tie_word_embeddings", False)
        self.num_tokens = num_tokens
        self.vocab_size = num_tokens + 1
        self.mask_token_id = kwargs.pop("mask_token_id", num_tokens)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.max_position_embeddings = max_position_embeddings
        self.prediction = prediction
        self.visibility = visibility
        self.context_group = context_group
        self.inexact_context = inexact_context
        self.window_width = max_position_embeddings if window_width is None else window_width
        self.conditioning = conditioning
        self.interpolation = interpolation
        self.rotary_base = rotary_base
        self.sigma_range = list(sigma_range)
        self.noise_schedule = noise_schedule or {"kind": "linear"}
        self.noising = noising or {"kind": "absorb"}
        self.alpha_max = alpha_max
        self.epsilon = epsilon
        self.reading = reading
        self.hyperschedule = hyperschedule or {"kind": "flat", "steps": max_position_embeddings}
        self.generates = generates
        self.learned_corrections = learned_corrections
        super().__init__(bos_token_id=bos_token_id, **kwargs)
