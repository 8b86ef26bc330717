"""Parameters and multiply-accumulates (MACs) of the models and of their training, from shapes alone. No torch in here.

Two ways of adding up the cost of training:

- `exact`: what this program does: the lengths and the number of captions as configured, projectors, contrastive loss,
  teacher, whatever is computed again to save memory, and the optimizer once a step (`exact_breakdown`).
- `paper`: the accounting that reproduces the published tables, CoM-PT's Table G and Table 2 (`paper_breakdown`).
"""

from compt.macs.breakdown import (
    OPTIMIZER_PARAMETER_MACS,
    Breakdown,
    JobCost,
    Mode,
    Part,
    Record,
    exact_breakdown,
    exact_cost,
)
from compt.macs.counts import (
    Count,
    Tokens,
    attention_matmuls,
    contrastive_macs,
    forward_macs,
    image_tower,
    linear,
    parameters,
    projector,
    text_tower,
    token_moments,
    total,
)
from compt.macs.published import (
    PAPER_PARAMETER_MACS,
    PAPER_TEXT_PASSES,
    PAPER_TOKENS,
    paper_breakdown,
    paper_cost,
    paper_forward_macs,
    paper_parameters,
    paper_training_macs,
)

__all__ = [
    "OPTIMIZER_PARAMETER_MACS",
    "PAPER_PARAMETER_MACS",
    "PAPER_TEXT_PASSES",
    "PAPER_TOKENS",
    "Breakdown",
    "Count",
    "JobCost",
    "Mode",
    "Part",
    "Record",
    "Tokens",
    "attention_matmuls",
    "contrastive_macs",
    "exact_breakdown",
    "exact_cost",
    "forward_macs",
    "image_tower",
    "linear",
    "paper_breakdown",
    "paper_cost",
    "paper_forward_macs",
    "paper_parameters",
    "paper_training_macs",
    "parameters",
    "projector",
    "text_tower",
    "token_moments",
    "total",
]
