"""Each seam, proved by something added through it from outside of the package."""
