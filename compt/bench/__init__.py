"""The time of real training steps."""
