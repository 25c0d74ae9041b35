"""The flags of a run: one frozen dataclass, with a file for each subject."""
