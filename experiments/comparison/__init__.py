"""Comparisons: parts that are runs of their own, and what they add up to."""
