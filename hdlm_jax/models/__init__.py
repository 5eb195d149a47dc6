"""The network: a Flax Linen transformer (parameters only), attention and the KV cache."""
