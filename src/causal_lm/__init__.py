"""Causal language models with Lightning and Hydra, right where others go wrong silently."""
