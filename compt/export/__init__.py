"""Models in the formats of other programs, with a model card, and to the Hugging Face Hub."""
