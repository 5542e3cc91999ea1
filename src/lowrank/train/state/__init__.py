"""A run as one value, and its checkpoints: all that a step changes, so that a run goes on exactly where it was."""
