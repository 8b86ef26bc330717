"""From a recipe to jobs, and what they need of machines: time, memory, disk."""
