"""Meshes, mapping over copies, and counts of devices."""
