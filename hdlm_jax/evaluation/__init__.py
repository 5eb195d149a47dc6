"""Evaluation: the bound on held-out or any text."""
