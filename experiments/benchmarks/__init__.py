"""What `experiments.bench` times, here and with PyTorch."""
