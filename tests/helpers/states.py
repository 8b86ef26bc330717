"""States of whole models in memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from compt.expand.execute import Draw, ExpandedState
from compt.expand.plan import ExpansionPlan
from compt.models.scalars import exported_shape


def export_state(model: nn.Module) -> dict[str, Tensor]:
    """open_clip's state dict on the CPU: the learned scalars in shape (), all else as it is."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return {name: tensor.reshape(exported_shape(name, tensor.shape)) for name, tensor in state.items()}


def expand_state(
    plan: ExpansionPlan, state: Mapping[str, Tensor], draw: Draw, average: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """All student parameters in memory."""
    return dict(ExpandedState(plan, state, draw, average))
