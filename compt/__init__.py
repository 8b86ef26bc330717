"""Chain-of-Models Pre-Training: train a family of CLIP models, each from its smaller predecessor."""

__version__ = "0.1.0"
