"""Generation: the scan over generation steps, with and without the exact KV cache."""
