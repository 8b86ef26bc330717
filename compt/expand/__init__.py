"""Inverse weight initialization: a larger model's first weights, gathered from a smaller trained one."""

from compt.expand.execute import Draw, ExpandedState, SeededDraw, expand, expand_parameter, expand_state
from compt.expand.operators import WIDTH, AxisMap
from compt.expand.plan import Entry, Plan, make_plan
from compt.growth import DEPTH, ExpandConfig, TowerGrowth

__all__ = [
    "DEPTH",
    "WIDTH",
    "AxisMap",
    "Draw",
    "Entry",
    "ExpandConfig",
    "ExpandedState",
    "Plan",
    "SeededDraw",
    "TowerGrowth",
    "expand",
    "expand_parameter",
    "expand_state",
    "make_plan",
]
