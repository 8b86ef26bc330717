"""Analytic parameters and MACs against the real modules, torch's counter and the published table."""

from __future__ import annotations

import open_clip.model
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compt.macs import (
    exact_cost,
    forward_macs,
    image_tower,
    paper_cost,
    paper_forward_macs,
    paper_parameters,
    paper_training_macs,
    parameters,
    projector,
    text_tower,
    total,
)
from compt.models import build
from compt.presets import PRESETS, ModelSpec, resolve

# CoM-PT (arXiv 2604.12391), Table G: image, text and total parameters in millions, forward and training GMACs a sample.
TABLE_G = {
    "vit_t16": (5.62, 9.48, 15.10, 5.82, 17.57),
    "vit_c16": (9.86, 14.80, 24.66, 9.23, 27.87),
    "vit_s16": (21.81, 21.29, 43.10, 14.44, 43.65),
    "vit_m16": (38.59, 28.97, 67.56, 21.88, 66.17),
    "vit_b16": (86.19, 37.83, 124.02, 35.09, 106.27),
    "vit_xb16": (171.36, 37.83, 209.19, 48.76, 148.05),
    "vit_l16": (304.09, 85.05, 389.14, 100.92, 306.11),
    "swin_t": (27.91, 9.48, 37.39, 8.76, 26.60),
    "swin_s": (49.23, 21.29, 70.52, 18.40, 55.82),
    "swin_b": (87.27, 37.83, 125.10, 32.71, 98.84),
    "swin_l": (195.78, 85.05, 280.83, 73.48, 222.94),
}
# The joint embeddings that Table G's parameters imply where they are not 512.
TABLE_G_EMBEDDING = {"vit_s16": 384, "vit_l16": 768}


def table_g_spec(name: str) -> ModelSpec:
    return resolve(name, {"embed_dim": TABLE_G_EMBEDDING.get(name, 512)})


def counted(function: object, *arguments: object, **options: object) -> float:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*arguments, **options)  # type: ignore[operator]
    return counter.get_total_flops() / 2


def inputs(spec: ModelSpec, pictures: int = 1, captions: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.zeros(pictures, 3, spec.image_size, spec.image_size, device="meta")
    return images, torch.zeros(pictures * captions, spec.context_length, dtype=torch.long, device="meta")


@pytest.mark.parametrize("name", PRESETS)
def test_stock_open_clip_has_these_parameters_and_macs(name: str) -> None:
    spec = PRESETS[name]
    with torch.device("meta"):
        model = open_clip.model.CLIP(**spec.open_clip_config())
    images, tokens = inputs(spec)

    assert parameters(spec) == sum(parameter.numel() for parameter in model.parameters())
    image, text = (sum(p.numel() for p in part.parameters()) for part in (model.visual, model.transformer))
    assert total(image_tower(spec).values()).parameters == image
    assert (
        text_tower(spec)["mlp"].parameters
        + text_tower(spec)["attention_projections"].parameters
        + 4 * spec.text_width * spec.text_depth  # norms
    ) == text
    assert total(image_tower(spec, readout=False).values()).macs == pytest.approx(
        counted(model.encode_image, images), rel=0.01
    )
    assert total(text_tower(spec, readout=False).values()).macs == pytest.approx(
        counted(model.encode_text, tokens), rel=0.01
    )


@pytest.mark.parametrize("name", PRESETS)
def test_our_model_has_these_macs(name: str) -> None:
    spec = PRESETS[name]
    model = build(spec, device="meta")
    images, tokens = inputs(spec)

    assert total(image_tower(spec).values()).macs == pytest.approx(counted(model.encode_image, images), rel=0.01)
    for length in (spec.context_length, 9):
        assert total(text_tower(spec, length).values()).macs == pytest.approx(
            counted(model.encode_text, tokens, length=length), rel=0.01
        )


@pytest.mark.parametrize("name", ["vit_nano", "vit_t16", "swin_t"])
def test_training_costs_what_the_counter_sees_forward_and_backward(name: str) -> None:
    spec, teacher = PRESETS[name], resolve("vit_nano", {"embed_dim": 64})
    batch, captions = 4, 2
    model = build(spec, device="meta")
    projectors = torch.nn.ModuleList(torch.nn.Linear(spec.embed_dim, 64, device="meta") for _ in range(2))
    images, tokens = inputs(spec, batch, captions)

    def step() -> None:
        image, text = model.encode_image(images), model.encode_text(tokens, length=spec.context_length)
        loss = projectors[0](image).sum() + projectors[1](text).sum()
        slots = text.view(batch, captions, -1)
        by_caption = slots.flatten(0, 1) @ image.T
        by_image = image @ slots.transpose(1, 2)
        (loss + by_caption.sum() + by_image.sum()).backward()

    cost = exact_cost(spec, teacher, steps=3, batch=batch, captions=captions)
    assert batch * (cost.student_training_macs + cost.loss_macs) == pytest.approx(counted(step), rel=0.01)
    assert cost.optimizer_step_macs == 3 * (parameters(spec) + sum(p.numel() for p in projectors.parameters()))
    assert cost.teacher_forward_macs == forward_macs(teacher, captions, min(32, spec.context_length))
    assert cost.total_macs == 3 * batch * cost.sample_macs + 3 * cost.optimizer_step_macs


def test_projectors_are_free_between_equal_embeddings() -> None:
    assert projector(PRESETS["vit_s16"], PRESETS["vit_t16"], 4).parameters == 0
    wider = resolve("vit_s16", {"embed_dim": 640})
    assert projector(wider, PRESETS["vit_t16"], 4).parameters == 2 * (640 * 512 + 512)
    assert projector(wider, PRESETS["vit_t16"], 4).macs == 5 * 640 * 512


def test_trimming_recomputation_and_captions_enter_the_cost() -> None:
    spec, teacher = PRESETS["vit_s16"], PRESETS["vit_t16"]
    whole = exact_cost(spec, teacher, steps=1, batch=8, captions=4)
    trimmed = exact_cost(spec, teacher, steps=1, batch=8, captions=4, tokens=26)
    again = exact_cost(spec, teacher, steps=1, batch=8, captions=4, recompute=True)

    assert trimmed.student_forward_macs < whole.student_forward_macs
    assert trimmed.teacher_forward_macs < whole.teacher_forward_macs
    assert exact_cost(spec, teacher, steps=1, batch=8, captions=4, tokens=500) == whole
    assert again.total_macs - whole.total_macs == pytest.approx(8 * whole.student_forward_macs)
    text = total(text_tower(spec).values()).macs
    assert forward_macs(spec, 4) - forward_macs(spec, 1) == pytest.approx(3 * text)


def test_the_published_formula_gives_the_published_training_macs() -> None:
    """Two rows do not follow from their own inputs; see the exceptions below."""
    exceptions = {"swin_b": 99.24, "vit_xb16": 148.01}
    for name, (_, _, millions, forward, training) in TABLE_G.items():
        patch = image_tower(PRESETS[name])["patch_embedding"].macs
        value = paper_training_macs(forward * 1e9, patch, millions * 1e6) / 1e9
        assert value == pytest.approx(exceptions.get(name, training), abs=0.01), name


@pytest.mark.parametrize("name", TABLE_G)
def test_table_g(name: str) -> None:
    spec = table_g_spec(name)
    image, text, whole, forward, training = TABLE_G[name]
    found = total(image_tower(spec).values()).parameters / 1e6
    if name == "vit_xb16":  # the published image parameters do not follow from width 1024 and depth 12
        assert found == pytest.approx(152.67, abs=0.01)
    else:
        assert found == pytest.approx(image, abs=0.01)
        assert paper_parameters(spec) / 1e6 == pytest.approx(whole, abs=0.011)
    assert paper_parameters(spec) / 1e6 - found == pytest.approx(text, abs=0.01)
    # vit_s16 counts 2.1 % more than published, the others less than 2 %.
    limit = 0.022 if name == "vit_s16" else 0.02
    assert paper_forward_macs(spec) / 1e9 == pytest.approx(forward, rel=limit)
    cost = paper_cost(spec, None, samples=1, steps=1)
    assert cost.total_macs / 1e9 == pytest.approx(training, rel=limit + 0.003)
