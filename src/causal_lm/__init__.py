"""Causal language models with PyTorch Lightning and Hydra."""
