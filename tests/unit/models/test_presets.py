"""Descriptions of models without torch: what follows from the sizes of a Swin, what is refused, what is written."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compt.errors import ConfigError
from compt.models.presets import PRESETS, ModelSpec, resolve, swin_name, swin_sizes

SWINS = {name: spec for name, spec in PRESETS.items() if spec.arch == "swin"}
TIMM_NAMES = {
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_l": "swin_large_patch4_window7_224",
    "swin_b384": "swin_base_patch4_window12_384",
    "swin_l384": "swin_large_patch4_window12_384",
}


def test_the_presets_have_timms_names() -> None:
    assert {name: spec.timm_name for name, spec in SWINS.items()} == TIMM_NAMES


def test_what_follows_from_a_swins_sizes_follows() -> None:
    spec = resolve("swin_t", {"width": 128, "depths": [2, 2, 8, 2]})
    assert (spec.depth, spec.heads, spec.stage_heads) == (14, 4, (4, 8, 16, 32))
    assert spec.depths == (2, 2, 8, 2)
    assert spec.timm_name == "compt_swin_w128_d2-2-8-2_h32_p4_win7_224"
    assert spec.final_width == 1024
    narrow = resolve("swin_t", {"head_width": 16, "mlp_ratio": 2.5, "image_size": 96, "window": 3})
    assert (narrow.heads, narrow.stage_heads) == (6, (6, 12, 24, 48))
    assert narrow.timm_name == "compt_swin_w96_d2-2-6-2_h16_p4_win3_mlp2p5_96"
    one = resolve("swin_t", {"depths": [3], "patch_size": 8})
    assert (one.depth, one.stage_heads, one.final_width) == (3, (3,), 96)


def test_a_swin_of_timms_sizes_has_timms_name() -> None:
    for start, sizes, name in (
        ("swin_t", {"width": 128, "depths": [2, 2, 18, 2]}, "swin_b"),
        ("swin_l384", {"image_size": 224, "window": 7}, "swin_l"),
        ("swin_b", {"image_size": 384, "window": 12, "width": 192}, "swin_l384"),
    ):
        assert resolve(start, sizes).timm_name == PRESETS[name].timm_name
    assert resolve("swin_t", {"text_width": 512, "embed_dim": 64}).timm_name == PRESETS["swin_t"].timm_name
    assert replace(SWINS["swin_b"], width=96, heads=3, stage_heads=(3, 6, 12, 24), timm_name="").timm_name == (
        PRESETS["swin_s"].timm_name
    )


@settings(deadline=None)
@given(
    heads=st.integers(1, 20),
    head_width=st.integers(1, 80),
    depths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    patch_size=st.integers(1, 16),
    side=st.integers(1, 100),
    window=st.integers(1, 20),
    mlp_ratio=st.sampled_from([1.0, 2.0, 2.5, 3.0, 4.0, 8 / 3, 10.25, 1 + 2**-50]),
)
def test_a_name_gives_all_sizes(
    heads: int, head_width: int, depths: list[int], patch_size: int, side: int, window: int, mlp_ratio: float
) -> None:
    sizes = {
        "width": heads * head_width,
        "head_width": head_width,
        "depths": tuple(depths),
        "patch_size": patch_size,
        "image_size": side * patch_size,
        "window": window,
        "mlp_ratio": mlp_ratio,
    }
    spec = resolve("swin_t", sizes)
    assert "." not in spec.timm_name
    assert swin_name(spec) == spec.timm_name
    found = swin_sizes(spec.timm_name)
    assert replace(spec, **found) == spec
    assert {key: found[key] for key in sizes} == sizes


@pytest.mark.parametrize("name", TIMM_NAMES.values())
def test_timms_names_tell_their_sizes(name: str) -> None:
    assert swin_sizes(name)["timm_name"] == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "convnext_base",
        "swinv2_tiny_window8_256",
        "swin_s3_tiny_224",
        "swin_tiny_patch4_window7_224.ms_in1k",
        "compt_swin",
        "compt_swin_w96_d2-2-6-2_h32_p4_win7_224",  # timm has a name for it
        "compt_swin_w064_d2_h32_p4_win7_224",
        "compt_swin_w64_d2_h32_p4_win7_mlp4_224",
        "compt_swin_w64_d2_h32_p4_win7_mlp3p0_224",
        "compt_swin_w64_d2_h32_p4_win7_224x",
        "compt_swin_w64_d2-_h32_p4_win7_224",
        # Sizes that no model has.
        "compt_swin_w65_d2_h32_p4_win7_224",
        "compt_swin_w0_d2_h32_p4_win7_224",
        "compt_swin_w64_d2_h0_p4_win7_224",
        "compt_swin_w64_d2-0_h32_p4_win7_224",
        "compt_swin_w64_d2_h32_p0_win7_224",
        "compt_swin_w64_d2_h32_p4_win0_224",
        "compt_swin_w64_d2_h32_p4_win7_226",
        "compt_swin_w64_d2_h32_p4_win7_mlp0_224",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        swin_sizes(name)


def test_a_window_is_no_larger_than_its_stage() -> None:
    assert PRESETS["swin_t"].stage_windows == (7, 7, 7, 7)
    assert PRESETS["swin_b384"].stage_windows == (12, 12, 12, 12)
    assert resolve("swin_t", {"image_size": 64}).stage_windows == (7, 7, 4, 2)
    assert resolve("swin_t", {"image_size": 20}).stage_windows == (5, 3, 2, 1)
    assert PRESETS["vit_b16"].stage_windows == ()


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        (
            "swin_t",
            {"width": 100},
            "width 100 is not 3 x 32 .heads x head width.; take a multiple of the head width 32",
        ),
        ("swin_t", {"depths": []}, "depth is 0; it must be at least 1"),
        ("swin_t", {"depths": [2, 0]}, r"depths is \[2, 0\]; .* at least 1"),
        ("swin_t", {"window": 0}, "window is 0; it must be at least 1"),
        ("swin_t", {"image_size": 50}, "image_size 50 is not a multiple of patch_size 4"),
        ("swin_t", {"heads": 4}, "width 96 is not 4 x 32"),
        ("swin_t", {"no_ln_pre": True}, "no_ln_pre is for ViTs"),
        ("swin_t", {"norm_eps": 1e-6}, "norm_eps 1e-06 is for ViTs"),
        ("vit_t16", {"norm_eps": 0.0}, r"norm_eps is 0.0; it must be a number above 0"),
        ("vit_t16", {"norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ("vit_t16", {"text_norm_eps": math.inf}, "text_norm_eps is inf"),
        ("swin_t", {"text_norm_eps": math.nan}, "text_norm_eps is nan"),
        ("vit_t16", {"mlp_ratio": 0.001}, "mlp_ratio is 0.001; it must be at least 1 / 192"),
        ("vit_t16", {"mlp_ratio": math.nan}, "mlp_ratio is nan"),
        ("vit_t16", {"width": 0}, "width is 0; it must be at least 1"),
        ("vit_t16", {"text_width": -64, "text_heads": -1}, "text_width is -64"),
    ],
)
def test_sizes_that_no_model_has_are_refused(name: str, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        resolve(name, sizes)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_depth_that_does_not_fit_its_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"depth is 12; the depths \[2, 2, 8, 2\] have 14"):
        replace(PRESETS["swin_t"], depths=(2, 2, 8, 2))
    with pytest.raises(ConfigError, match=r"stage_heads is \[3, 3, 3, 3\]; .*\[3, 6, 12, 24\]"):
        replace(PRESETS["swin_t"], stage_heads=(3, 3, 3, 3))
    with pytest.raises(ConfigError, match=r"timm_model_name swin_tiny_.*: a Swin of these sizes is called compt_swin"):
        replace(PRESETS["swin_t"], depths=(2, 2, 8, 2), depth=14)


OTHER: dict[str, dict[str, Any]] = {
    "vit_t16": {"quick_gelu": True, "norm_eps": 0.3, "text_norm_eps": 2e-6},
    "swin_t": {"quick_gelu": True, "text_norm_eps": 2e-6},
}


@pytest.mark.parametrize("name", OTHER)
def test_activation_and_eps_are_written_only_where_they_are_not_the_default(name: str) -> None:
    plain, other = PRESETS[name], resolve(name, OTHER[name])
    assert not OTHER[name].keys() & plain.to_dict().keys()
    assert ModelSpec.from_dict(plain.to_dict()) == plain
    assert {key: other.to_dict()[key] for key in OTHER[name]} == OTHER[name]
    assert other.to_dict() == {**plain.to_dict(), **OTHER[name]}
    assert ModelSpec.from_dict(other.to_dict()) == other

    config, default = other.open_clip_config(), plain.open_clip_config()
    assert not {"quick_gelu", "norm_kwargs"} & {*default, *default["vision_cfg"], *default["text_cfg"]}
    assert config.pop("quick_gelu") is True
    assert config["text_cfg"].pop("norm_kwargs") == {"eps": 2e-6}
    assert config["vision_cfg"].pop("norm_kwargs", None) == ({"eps": 0.3} if name == "vit_t16" else None)
    assert config == default
