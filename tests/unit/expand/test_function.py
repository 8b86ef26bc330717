"""What expanded weights compute: real open_clip and timm modules before and after."""

from __future__ import annotations

import pytest
import timm.models.swin_transformer as swin
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compt.expand import axes as axes_module
from compt.expand.axes import Axis, parameters
from compt.expand.execute import expand, expand_parameter
from compt.expand.plan import ExpansionPlan, make_plan
from compt.models.growth import ExpandConfig
from compt.models.init import init_tensor, rule_for
from compt.models.presets import PRESETS, ModelSpec
from tests.unit.expand.cases import TINY, build, features, sized


def weights(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """A model that is far from symmetric: its own initialization and noise on everything."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in parameters(spec).items():
        own = init_tensor(rule_for(spec, name, parameter.shape), seed, name, parameter.shape).double()
        state[name] = own + 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return state


def change(teacher: ModelSpec, student: ModelSpec, config: ExpandConfig) -> float:
    """The largest difference of image and text features that expansion makes."""
    state = weights(teacher)
    old = features(build(teacher, state), teacher)
    new = features(build(student, expand(make_plan(teacher, student, config), state, 3)), student)
    with torch.no_grad():
        return max(float((a - b).abs().max()) for a, b in zip(old, new, strict=True))


FOUR = sized("four", 2, 4, 1, 2)
SIX = sized("six", 2, 6, 1, 3)


@pytest.mark.parametrize("depth", ["duplicate", "stack", "constant"])
def test_zeroed_outputs_make_depth_preserve_the_function(depth):
    assert change(FOUR, SIX, ExpandConfig.both(depth=depth, zero_new_outputs=True)) < 1e-10
    assert change(FOUR, SIX, ExpandConfig.both(depth=depth)) > 1e-2


def test_interval_preserves_the_function_at_whole_ratios():
    twice = sized("eight", 2, 8, 1, 4)
    assert change(FOUR, twice, ExpandConfig.both(depth="interval", zero_new_outputs=True)) < 1e-10
    assert change(FOUR, twice, ExpandConfig.both(depth="interval")) > 1e-2


def gradients(model: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    image, text = (F.normalize(part, dim=-1) for part in features(model, spec))
    logits = model.logit_scale.exp() * image @ text.T
    model.zero_grad()
    F.cross_entropy(logits, torch.arange(len(logits))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def dead(plan: ExpansionPlan, grads: dict[str, Tensor]) -> list[str]:
    """Parameters with a new element whose gradient is zero, but for where that is so by construction."""
    found = []
    for entry in plan.entries:
        grad = grads[entry.name].clone()
        if entry.name == "token_embedding.weight":
            grad = grad[grad.abs().amax(dim=1) > 0]  # tokens that occur
        if entry.name.endswith("in_proj_bias"):
            grad = torch.cat([grad[: len(grad) // 3], grad[2 * len(grad) // 3 :]])  # softmax ignores key biases
        if entry.copied < entry.size and not (grad != 0).all():
            found.append(entry.name)
    return found


def test_every_new_weight_learns_after_insertion_and_duplication():
    student = sized("grown", 3, 4, 2, 2, embed_dim=8)
    plan = make_plan(TINY, student)
    model = build(student, expand(plan, weights(TINY), 1))
    assert dead(plan, gradients(model, student)) == []


def test_zeroed_layers_learn_after_one_step():
    plan = make_plan(FOUR, SIX, ExpandConfig.both(zero_new_outputs=True))
    model = build(SIX, expand(plan, weights(FOUR), 1))
    names = [entry.name for entry in plan.entries if entry.zeroed]
    grads = gradients(model, SIX)
    assert len(names) == 4 * 3
    assert all((grads[name] != 0).any() for name in names)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    grads = gradients(model, SIX)
    assert all((grads[name] != 0).any() for name in grads if ".resblocks.1." in name)


class Kept:
    """Own initializations that are what a module has."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters

    def own(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.parameters[name]

    def noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        raise AssertionError(f"noise for {name} was asked for")


def copy_expanded(prefix: str, old: nn.Module, new: nn.Module) -> None:
    """Expand one real module of a swin_s into that of a swin_b; new elements stay as `new` has them."""
    entries = {entry.name: entry for entry in make_plan(PRESETS["swin_s"], PRESETS["swin_b"]).entries}
    teacher, student = ({f"{prefix}.{name}": p for name, p in each.named_parameters()} for each in (old, new))
    with torch.no_grad():
        for name, parameter in student.items():
            result = expand_parameter(entries[name], lambda full, average: teacher[full], Kept(student))
            parameter.copy_(result)


def test_real_window_attention_computes_the_same_in_its_old_heads():
    assert attention_change() < 1e-12


def test_packed_rows_of_window_attention_as_one_block_are_noticed(monkeypatch):
    def one_block(prefix: str, heads: int, head_width: int, suffix: str = ""):
        head = Axis(f"{prefix}head{suffix}", heads, "hidden")
        return (Axis(f"{prefix}rows{suffix}", 3 * heads * head_width, "hidden"),), (head, Axis("hd", head_width))

    monkeypatch.setattr(axes_module, "_attention_axes", one_block)
    assert attention_change() > 1e-2


def attention_change() -> float:
    """How far timm's attention over 96 channels is from its expansion to 128 whose inputs and outputs are cut to 96.

    The new columns of the output projection are zero, so that new heads are silent.
    """
    torch.manual_seed(0)
    old, new = (swin.WindowAttention(width, width // 32, window_size=7).double() for width in (96, 128))
    nn.init.normal_(old.relative_position_bias_table)
    nn.init.normal_(old.qkv.bias)
    nn.init.zeros_(new.proj.weight)
    copy_expanded("visual.trunk.layers.0.blocks.1.attn", old, new)
    x = torch.randn(2, 49, 96, dtype=torch.float64)
    with torch.no_grad():
        return float((new(F.pad(x, (0, 32)))[..., :96] - old(x)).abs().max())


def test_real_patch_merging_keeps_its_neighbours_apart():
    torch.manual_seed(0)
    old, new = (swin.PatchMerging(width, 2 * width).double() for width in (96, 128))
    prefix = "visual.trunk.layers.1.downsample"
    for parameter in old.parameters():
        nn.init.normal_(parameter)
    copy_expanded(prefix, old, new)
    for each in (old, new):
        each.norm = nn.Identity()  # a norm over more channels has other statistics
    x = torch.randn(2, 4, 4, 96, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(new(F.pad(x, (0, 32)))[..., :192], old(x), atol=1e-12)


def test_the_norm_of_patch_merging_expands_neighbour_by_neighbour():
    old, new = swin.PatchMerging(96, 192), swin.PatchMerging(128, 256)
    with torch.no_grad():
        old.norm.weight.copy_(torch.arange(1, 385))
        new.norm.weight.fill_(-1)
    copy_expanded("visual.trunk.layers.1.downsample", old, new)
    grid = new.norm.weight.reshape(4, 128)
    assert torch.equal(grid[:, :96], torch.arange(1.0, 385).reshape(4, 96))
    assert (grid[:, 96:] == -1).all()
