"""One run: its flags, task, checkpoints, directory and lock, progress."""
