"""Checkpoints of other forms: the authors' published ones, and files that leave the package."""
