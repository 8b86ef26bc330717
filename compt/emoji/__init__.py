"""The emoji data set of the demo."""
