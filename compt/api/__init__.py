"""What a program may import from `compt`, and the page about it."""
