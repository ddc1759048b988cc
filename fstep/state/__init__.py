"""The state of a training run, and how it is kept."""
