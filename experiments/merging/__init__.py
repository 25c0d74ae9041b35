"""What `experiments.soup` checks and prints."""
