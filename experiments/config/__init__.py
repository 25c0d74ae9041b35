"""What a run is told: one frozen dataclass whose fields are flags, a file for a subject."""
