"""Quantization methods: pure functions from tensors to tensors."""
