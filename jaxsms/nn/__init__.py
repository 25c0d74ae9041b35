"""Lowerings of convolutions, and normalization."""
