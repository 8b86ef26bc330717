"""Counter-based initialization: the same in any pieces, open_clip's distributions, strict loading of states."""

import math
from dataclasses import replace

import open_clip.model
import pytest
import torch

from compt.errors import ArtefactError
from compt.models.clip import build
from compt.models.init import InitRule, init_tensor, linear_rule, load_state, rule_for
from compt.models.presets import PRESETS, resolve
from tests.helpers.states import export_state

RULES = {
    "normal": InitRule("normal", 0.3),
    "uniform": InitRule("uniform", 0.3),
    "trunc_normal": InitRule("trunc_normal", 0.3, 0.4),
    "constant": InitRule("constant", 2.5),
    "zeros": InitRule("zeros"),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("chunk", [1, 7, 64, 600, 601])
def test_the_size_of_the_inner_chunks_changes_no_value(monkeypatch, rule, chunk):
    whole = init_tensor(rule, 7, "a.weight", (20, 30))
    assert whole.shape == (20, 30)
    monkeypatch.setattr("compt.models.init._CHUNK", chunk)
    assert torch.equal(init_tensor(rule, 7, "a.weight", (20, 30)), whole)


def test_the_values_are_pinned():
    """A change here makes old runs irreproducible."""
    values = init_tensor(InitRule("normal", 1.0), 0, "visual.proj", (4,))
    torch.testing.assert_close(
        values, torch.tensor([0.597175896, 0.436671078, 0.497354299, 0.771963179]), rtol=1e-6, atol=0
    )


def test_a_name_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"visual\.nothing"):
        rule_for(PRESETS["vit_pico"], "visual.nothing", (1,))


@pytest.mark.parametrize("rule", [RULES["normal"], RULES["uniform"], RULES["trunc_normal"]])
def test_another_seed_or_name_changes_every_value(rule):
    one = init_tensor(rule, 0, "a", (1000,))
    assert not (one == init_tensor(rule, 1, "a", (1000,))).any()
    assert not (one == init_tensor(rule, 0, "b", (1000,))).any()
    assert len(one.unique()) > 990


@pytest.mark.parametrize(
    ("rule", "cdf"),
    [
        (RULES["normal"], lambda x: torch.special.ndtr(x / 0.3)),
        (RULES["uniform"], lambda x: (x / 0.3 + 1) / 2),
        (
            RULES["trunc_normal"],
            lambda x: (torch.special.ndtr(x / 0.3) - (low := 0.5 * math.erfc(4 / 3 / 2**0.5))) / (1 - 2 * low),
        ),
    ],
)
def test_the_values_follow_their_distribution(rule, cdf):
    """Kolmogorov-Smirnov against the exact distribution, and no correlation between neighbours."""
    n = 200_000
    drawn = init_tensor(rule, 3, "a", (n,)).double()
    distance = (cdf(drawn.sort().values) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # one in a thousand would be above
    centred = drawn - drawn.mean()
    for lag in (1, 2, 4, 8):
        assert abs((centred[lag:] * centred[:-lag]).mean() / centred.square().mean()) < 4 / math.sqrt(n)


FAMILY = {
    "vit_nano": PRESETS["vit_nano"],
    "vit_t16": resolve("vit_t16", {"depth": 2, "text_depth": 3}),
    "vit_l16": resolve("vit_l16", {"depth": 1, "text_depth": 1, "vocab_size": 2000}),
    "no_ln_pre": resolve("vit_pico", {"no_ln_pre": True, "mlp_ratio": 3.0}),
    "norms of another eps": resolve("vit_pico", {"norm_eps": 0.5, "text_norm_eps": 0.1, "quick_gelu": True}),
    "swin_t": resolve("swin_t", {"text_depth": 1}),
    "swin_b": resolve("swin_b", {"text_depth": 1, "vocab_size": 2000}),
}


@pytest.mark.parametrize(
    "spec", [pytest.param(FAMILY[name], id=name, marks=[pytest.mark.full] * (name == "swin_b")) for name in FAMILY]
)
def test_each_parameter_is_distributed_as_in_open_clip(spec):
    torch.manual_seed(0)
    reference = dict(open_clip.model.CLIP(**spec.open_clip_config()).named_parameters())
    ours = dict(build(spec, seed=5).named_parameters())
    assert ours.keys() == reference.keys()
    for name, parameter in reference.items():
        a, b = parameter.detach().double().flatten(), ours[name].detach().double().flatten()
        if a.numel() == 1 or a.std() == 0:
            torch.testing.assert_close(b, a, rtol=1e-6, atol=0, msg=name)
            continue
        n, scale = a.numel(), a.std()
        rule = rule_for(spec, name, parameter.shape)
        assert abs(a.mean() - b.mean()) < 6 * scale * math.sqrt(2 / n), name
        kurtosis = 0.8 if rule.kind == "uniform" else 2.0
        assert abs(b.std() / scale - 1) < 6 * math.sqrt(kurtosis / 2 / n), f"{name}: {b.std()} for {scale}"
        if rule.kind == "uniform":
            # Extremes distinguish a uniform from a normal of equal variance, and show its bound.
            for sample in (a, b):
                assert sample.abs().max() <= rule.scale * (1 + 1e-6), name
                assert sample.abs().max() > rule.scale * (1 - 20 / n), name
        elif n > 10_000:
            assert b.abs().max() > 3.3 * scale, name


def test_no_two_parameters_share_values():
    firsts = [
        p.flatten()[:4].tolist() for p in build(PRESETS["vit_nano"], seed=5).parameters() if p.numel() > 4 and p.std()
    ]
    assert len({round(value, 9) for values in firsts for value in values}) > 0.99 * 4 * len(firsts)


def test_the_default_of_linear_layers_is_torchs():
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 400)
    for sample in (layer.weight, layer.bias, init_tensor(linear_rule(300), 0, "w", (400, 300))):
        assert 0.98 * 300**-0.5 < sample.abs().max() <= 300**-0.5


def test_states_go_out_with_a_scalar_logit_scale_and_come_back():
    model = build(PRESETS["vit_pico"], seed=1)
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    state = export_state(model)
    assert state["logit_scale"].shape == ()
    for logit_scale in (state["logit_scale"], state["logit_scale"].reshape(1)):
        other = build(PRESETS["vit_pico"], seed=2)
        load_state(other, state | {"logit_scale": logit_scale})
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_of_another_model_is_refused_key_by_key():
    model = build(PRESETS["vit_pico"], seed=1)
    before = export_state(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    state = dict(before)
    del state["visual.proj"]
    state["visual.project"] = torch.zeros(1)
    state["ln_final.weight"] = torch.zeros(5)
    with pytest.raises(ArtefactError) as caught:
        load_state(model, state)
    message = str(caught.value)
    assert "visual.proj is missing" in message
    assert "visual.project is unexpected" in message
    assert "ln_final.weight has shape [5] instead of [32]" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in export_state(model).items())

    with pytest.raises(ArtefactError, match=r"is missing; .* and \d+ more") as caught:
        load_state(model, {})
    assert str(caught.value).count("; ") == 7


def test_every_preset_has_a_rule_for_every_parameter():
    for spec in PRESETS.values():
        for name, parameter in build(spec, device="meta").named_parameters():
            rule_for(spec, name, parameter.shape)
    renamed = replace(PRESETS["vit_pico"], name="other")
    assert rule_for(renamed, "visual.proj", (32, 128)) == InitRule("normal", 32**-0.5)
