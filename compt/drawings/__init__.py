"""Sets of drawings with captions: the emoji of the demo, and icons."""
