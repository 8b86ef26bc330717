"""Inverse weight initialization: a larger model's first weights, gathered from a smaller trained one."""

from compt.expand.execute import ExpandedState, expand, expand_parameter, expand_state
from compt.expand.operators import DEPTH, WIDTH, AxisMap
from compt.expand.plan import Entry, ExpandConfig, Plan, make_plan

__all__ = [
    "DEPTH",
    "WIDTH",
    "AxisMap",
    "Entry",
    "ExpandConfig",
    "ExpandedState",
    "Plan",
    "expand",
    "expand_parameter",
    "expand_state",
    "make_plan",
]
