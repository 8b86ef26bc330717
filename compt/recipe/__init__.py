"""The recipe: its schema, how it is read and checked, and the page that describes every field."""
