"""Models to start from, as compt, open_clip, Hugging Face, torch and DeepSpeed write them."""

from compt.sources.infer import model_spec
from compt.sources.opened import average_of, open_model

__all__ = ["average_of", "model_spec", "open_model"]
