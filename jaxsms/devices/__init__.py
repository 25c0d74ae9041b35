"""Meshes, mapping over copies, counts, and advice where memory runs out."""
