"""Evaluation: the bound on held-out or any text, the quality of generated texts, diagnostics of a model."""
