"""Perplexity and comparison with the original."""
