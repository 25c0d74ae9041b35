"""What results.json, run.json and metrics.jsonl must look like to be read."""
