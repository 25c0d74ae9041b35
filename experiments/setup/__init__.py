"""What a run computes with: data, network, programs and devices."""
