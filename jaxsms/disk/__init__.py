"""Models on disk that are larger than memory: read, averaged and written by part."""
