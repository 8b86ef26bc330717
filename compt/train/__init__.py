"""Training one model: losses, task, and the one loop."""
