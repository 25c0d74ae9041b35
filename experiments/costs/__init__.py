"""What runs and networks take: seconds of phases, times of inferences, latency."""
