"""Sets of drawings with captions: the emoji of the demo, icons, and clip art."""
