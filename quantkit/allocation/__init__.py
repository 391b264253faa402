"""Bits where they count: which linears get how many, for a target in bits per weight or in bytes."""
