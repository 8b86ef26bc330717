"""The training step beside those of other programs."""
