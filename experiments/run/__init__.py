"""One run: its directory and lock, checkpoints, progress, export."""
