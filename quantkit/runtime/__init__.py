"""Modules that run a quantized checkpoint."""
