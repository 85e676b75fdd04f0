"""Causal language models with Lightning and Hydra, right in the three places that go wrong silently."""
