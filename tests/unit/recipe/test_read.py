"""Recipes are strict: whatever is wrong is one line with file, key, value and the nearest thing that would be right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from compt.errors import ConfigError
from compt.models.growth import ExpandConfig, TowerGrowth
from compt.recipe.expansion import expand_result, expand_words, expansion
from compt.recipe.read import find_recipe, load_recipe, parse_recipe, read_yaml, shipped, split_batch
from compt.recipe.reference import EXPANSION_EXAMPLE, reference
from compt.recipe.schema import Recipe
from compt.recipe.types import Duration

ROOT = Path(__file__).resolve().parents[3]

RECIPE = """
name: small
data: {train: shards/*.tar, images: 2_000}
family: {members: [vit_nano, {name: wide, preset: vit_micro, width: 128}]}
chain:
  links:
    - {model: vit_nano, train: {epochs: 4}, warmup: {steps: 10}}
    - {model: wide, train: {steps: 50}, warmup: {steps: 5}, lr: 5e-4}
baselines: {train: {epochs: 4}, warmup: {steps: 10}}
optimizer: {batch: 64, lr: 1e-3}
evaluation:
  sets: [{name: val_style, data: val/*.tar}]
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str = RECIPE) -> Path:
        path = tmp_path / "small.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("text", "tokens"), [("7.4", 7.4), ("7", 7.0), ("{7: 1, 9: 0.5}", {7: 1.0, 9: 0.5}), ("null", None)]
)
def test_the_lengths_of_captions(write, text: str, tokens: object) -> None:
    recipe = load_recipe(write(), [f"data.caption_tokens={text}"])
    assert recipe.data.caption_tokens == tokens
    assert "caption_tokens" not in recipe.data.result_fields()
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(by_alias=True, mode="json")))) == recipe


def test_a_whole_recipe(write) -> None:
    recipe = load_recipe(write())
    assert recipe.data.train == ["shards/*.tar"]
    assert recipe.data.images == 2000
    assert recipe.optimizer.lr == 1e-3
    assert recipe.chain.links[1].lr == 5e-4
    assert recipe.chain.links[1].train.to_steps(2000, 64) == 50
    assert recipe.chain.links[0].train.to_steps(2000, 64) == 4 * 31
    specs = recipe.family.specs()
    assert list(specs) == ["vit_nano", "wide"]
    assert (specs["wide"].name, specs["wide"].width, specs["wide"].heads, specs["wide"].text_width) == (
        "wide",
        128,
        4,
        96,
    )


def test_a_link_changes_the_engine_while_it_trains(write) -> None:
    recipe = load_recipe(
        write(),
        [
            "engine={name: fsdp2, workers: 3, fsdp2: {replicas: 2, cpu_offload: true}}",
            "chain.links.0.engine={name: zero2, micro_batch: 8}",
            "chain.links.1.engine={fsdp2: {replicas: 4}}",
        ],
    )
    first, second = (recipe.engine_of(name) for name in ("vit_nano", "wide"))
    assert (first.name, first.micro_batch, first.workers, first.fsdp2.replicas) == ("zero2", 8, 3, 1)
    assert (second.name, second.fsdp2.replicas, second.fsdp2.cpu_offload) == ("fsdp2", 4, True)
    assert recipe.engine_of("another") is recipe.engine
    assert "engine" not in recipe.chain.links[0].result_fields()
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(by_alias=True, mode="json"))))
    assert again.engine_of("wide") == second


def test_only_another_name_leaves_the_options_of_an_engine_behind(write) -> None:
    repeated = "chain.links.0.engine={name: fsdp2, micro_batch: 8}"
    recipe = load_recipe(write(), ["engine={name: fsdp2, fsdp2: {cpu_offload: true}}", repeated])
    assert recipe.engine_of("vit_nano").fsdp2.cpu_offload
    repeated = "chain.links.0.engine={name: zero2, micro_batch: 8}"
    recipe = load_recipe(
        write(),
        ["engine={name: zero2, deepspeed_config: own.json}", repeated, "chain.links.1.engine={name: zero3}"],
    )
    assert recipe.engine_of("vit_nano").deepspeed_config == "own.json"
    assert recipe.engine_of("wide").deepspeed_config is None


WRONG = {
    "typo": ("optimizer: {batch", "optimizer: {batsh", "optimizer.batsh = 64: unknown key (did you mean 'batch'?)"),
    "typo of a required key": (
        "{steps: 50}, warmup",
        "{steps: 50}, warmpu",
        "chain.links.1.warmpu: unknown key (did you mean 'warmup'?)",
    ),
    "typo in a duration": ("{steps: 50}", "{step: 50}", "chain.links.1.train.step = 50: unknown key (did you mean"),
    "wrong type": ("batch: 64", "batch: many", "optimizer.batch = 'many': should be a valid integer"),
    "a truth value for a number": ("batch: 64", "batch: true", "optimizer.batch = True: should be a valid integer"),
    "out of range": ("lr: 1e-3", "lr: -1e-3", "optimizer.lr = -0.001: should be greater than 0"),
    "missing unit": (
        "{epochs: 4}, warmup: {steps: 10}}\nopt",
        "4, warmup: {steps: 10}}\nopt",
        "baselines.train = 4: needs",
    ),
    "two units": (
        "{steps: 50}",
        "{steps: 50, epochs: 2}",
        "train: needs exactly one of epochs, steps, samples; it has",
    ),
    "no unit": ("{steps: 50}", "{}", "chain.links.1.train: needs exactly one of epochs, steps, samples; it has none"),
    "unknown model": ("[vit_nano,", "[vit_nono,", "not a member of the family (did you mean 'vit_nono'?)"),
    "unknown preset": (
        "preset: vit_micro",
        "preset: vit_mirco",
        "family.members.1: unknown model 'vit_mirco' (did you mea",
    ),
    "unknown size": ("width: 128", "widht: 128", "family.members.1: widht: unknown key (did you mean 'width'?)"),
    "size of a wrong type": ("width: 128", "width: big", "family.members.1: width = 'big': should be a whole number"),
    "width no multiple": ("width: 128", "width: 100", "take a multiple of the head width 32"),
    "a name twice": ("[vit_nano,", "[vit_nano, vit_nano,", "family.members.1: the name 'vit_nano' is there twice"),
    "link without model": (
        "model: wide",
        "model: wider",
        "chain.links: 'wider' is not a member of the family (did you mean",
    ),
    "link twice": ("model: wide", "model: vit_nano", "chain.links: a model is there twice"),
    "duplicate key": ("name: small", "name: small\nname: large", "line 3: the key 'name' occurs twice"),
    "a key that is a list": ("name: small", "[a]: small", "line 2: a key should be a plain word"),
    "no YAML": ("members: [", "members: [[", "is not YAML:"),
    "missing section": ("data: {train: shards/*.tar, images: 2_000}", "", "data: is missing"),
    "value for a section": (
        "optimizer: {batch: 64, lr: 1e-3}",
        "optimizer: 5",
        "optimizer = 5: should be a section with the",
    ),
    "unknown choice": (
        "lr: 1e-3}",
        "precision: bf61}",
        "optimizer.precision = 'bf61': should be 'bf16', 'fp16' or 'fp32'",
    ),
    "nearest choice": ("lr: 1e-3}", "precision: bf61}", "(did you mean 'bf16'?)"),
    "unknown operator": (
        "chain:",
        "chain:\n  expand: {width: insret}",
        "chain.expand.width = 'insret': unknown width operator (did you mean 'insert'?); known: insert, duplicate",
    ),
    "unknown operator of a link's tower": (
        "lr: 5e-4}",
        "lr: 5e-4, expand: {text: {depth: dupliate}}}",
        "chain.links.1.expand.text.depth = 'dupliate': unknown depth operator (did you mean 'duplicate'?)",
    ),
    "a depth operator for widths": (
        "lr: 5e-4}",
        "lr: 5e-4, expand: {width: stack}}",
        "chain.links.1.expand.width = 'stack': unknown width operator",
    ),
    "a misspelt tower": (
        "lr: 5e-4}",
        "lr: 5e-4, expand: {txt: {width: lemon}}}",
        "chain.links.1.expand.txt: unknown key (did you mean 'text'?); known here: width, depth, zero",
    ),
    "noise that is no share": (
        "chain:",
        "chain:\n  expand: {noise: 1}",
        "chain.expand.noise = 1: should be less than 1",
    ),
    "noise of one tower": (
        "chain:",
        "chain:\n  expand: {image: {noise: 0.1}}",
        "chain.expand.image.noise = 0.1: unknown key; known here: width, depth, zero_new_outputs",
    ),
    "an expansion from scratch": (
        "{model: vit_nano, train: {epochs: 4}, warmup: {steps: 10}}",
        "{model: vit_nano, train: {epochs: 4}, warmup: {steps: 10}, expand: {width: lemon}}",
        "chain.links.0.expand: this link starts from scratch; leave it out",
    ),
    "random weights from scratch": (
        "{model: vit_nano, train: {epochs: 4}, warmup: {steps: 10}}",
        "{model: vit_nano, train: {epochs: 4}, warmup: {steps: 10}, initial: random}",
        "chain.links.0.initial: this link starts from scratch; leave it out",
    ),
    "an expansion of random weights": (
        "lr: 5e-4}",
        "lr: 5e-4, initial: random, expand: {width: lemon}}",
        "chain.links.1.expand: nothing is expanded with initial: random; leave it out",
    ),
    "random weights without distillation": (
        "lr: 5e-4}",
        "lr: 5e-4, initial: random, alpha: 0}",
        "chain.links.1.initial: random with an alpha of 0 uses nothing of the teacher",
    ),
    "a rate of no member": (
        "baselines: {",
        "baselines: {lr: {wild: 1e-3}, ",
        "baselines.lr.wild: is not a member of the family (did you mean 'wide'?)",
    ),
    "a model of nothing": (
        "chain:",
        "chain:\n  from_model: vit_b16",
        "chain.from_model: is for a model at chain.from, ",
    ),
    "a prefix of nothing": ("chain:", "chain:\n  from_prefix: module.", "chain.from_prefix: is for a model at chain.f"),
    "no evaluation set": (
        "sets:",
        "primary: val_stile\n  sets:",
        "primary 'val_stile' is not an evaluation set (did you mean",
    ),
    "batch above images": ("batch: 64", "batch: 4096", "optimizer.batch 4096 is larger than data.images 2000"),
    "impossible crop": ("images: 2_000", "images: 2_000, crop_scale: [0.9, 0.5]", "crop_scale 0.9, 0.5 is not a range"),
    "impossible shape": ("images: 2_000", "images: 2_000, crop_ratio: [0, 1]", "crop_ratio 0.0, 1.0 is not a range"),
    "jitter of nothing": (
        "images: 2_000",
        "images: 2_000, augment: {jitter: 0.5, grey: 0.2}",
        "jitter = 0.5: set brightness, contrast",
    ),
    "more than half a circle": (
        "images: 2_000",
        "images: 2_000, augment: {hue: 0.6}",
        "data.augment.hue = 0.6: should be less than or equal to 0.5",
    ),
    "count with a wrong suffix": (
        "images: 2_000",
        "images: 2T",
        "data.images = '2T': should be a whole number, or one with",
    ),
    "a member changed that has no such part": (
        "preset: vit_micro, width",
        "preset: swin_t, no_ln_pre: true, width",
        "family.members.1: no_ln_pre: a Swin has none; known here: width, depths, heads",
    ),
    "depths of a ViT": ("width: 128", "depths: [2, 2]", "family.members.1: depths: a ViT has none; known here: width,"),
    "depths that are none": (
        "preset: vit_micro, width: 128",
        "preset: swin_t, depths: [2, 0]",
        "family.members.1: depths = [2, 0]: should be a list of whole numbers above 0",
    ),
    "a truth value of a number": ("width: 128", "quick_gelu: 1", "quick_gelu = 1: should be true or false"),
    "a negative size": ("width: 128", "width: -128", "family.members.1: width = -128: should be greater than 0"),
    "not a finite number": ("lr: 1e-3", "lr: .inf", "optimizer.lr = inf: should be a finite number"),
    "captions of no length": (
        "images: 2_000",
        "images: 2_000, caption_tokens: 0",
        "data.caption_tokens = 0: should be a",
    ),
    "captions of a length in words": (
        "images: 2_000",
        "images: 2_000, caption_tokens: {long: 1}",
        "data.caption_tokens: the length 'long' should be a whole number of tokens, at least 1",
    ),
    "a negative share of captions": (
        "images: 2_000",
        "images: 2_000, caption_tokens: {7: 0.5, 9: -1}",
        "data.caption_tokens: the share -1 of length 9 should be a number, at least 0",
    ),
    "no share of captions": ("images: 2_000", "images: 2_000, caption_tokens: {7: 0}", "needs a share above 0"),
    "no shards": ("train: shards/*.tar", "train: []", "data.train: should not be empty"),
    "one number for two": ("lr: 1e-3", "betas: 0.9", "optimizer.betas = 0.9: should be a list of numbers"),
    "a list for a mapping": ("{members: [", "{common: [a], members: [", "family.common: should be a mapping"),
    "a member's name that is a path": (
        "{name: wide,",
        "{name: ../wide,",
        "family.members.1.name = '../wide': becomes a file's name: should be of letters, digits,",
    ),
    "a recipe's name that is a path": ("name: small", "name: a/b", "name = 'a/b': becomes a file's name"),
    "a name with a space": (
        "name: val_style",
        "name: val style",
        "evaluation.sets.0.name = 'val style': becomes a fil",
    ),
    "a hidden name": ("name: small", "name: .small", "name = '.small': becomes a file's name"),
    "an empty name": ("name: small", "name: ''", "name = '': becomes a file's name"),
    "an engine's name": (
        "chain:",
        "engine: {name: dpp}\nchain:",
        "engine.name = 'dpp': should be 'ddp', 'fsdp2', 'zero0', ",
    ),
    "settings of another engine": (
        "chain:",
        "engine: {fsdp2: {replicas: 2}}\nchain:",
        "fsdp2 is for name fsdp2, not for 'ddp'",
    ),
    "a link's engine": (
        "model: wide,",
        "model: wide, engine: {nme: zero2},",
        "chain.links.1.engine.nme: unknown key (did you",
    ),
    "an option of a link's engine": (
        "model: wide,",
        "model: wide, engine: {name: fsdp2, fsdp2: {replica: 2}},",
        "chain.links.1.engine.fsdp2.replica: unknown key (did you mean 'replicas'?)",
    ),
    "a link's own device": (
        "model: wide,",
        "model: wide, engine: {device: cpu},",
        "chain.links.1.engine.device: is for the whole run; set engine.device",
    ),
    "a link's own timeout": (
        "model: wide,",
        "model: wide, engine: {timeout: 60},",
        "chain.links.1.engine.timeout: is for the whole run; set engine.timeout",
    ),
    "a length without end": (
        "train: {steps: 50}",
        "train: {epochs: 1e308}",
        "train.epochs = 1e+308: should be at most",
    ),
    "a count without end": ("name: small", f"name: small\nseed: 1{400 * '0'}", "0: should be at most 1e+18"),
    "captions without end": (
        "images: 2_000",
        f"images: 2_000, caption_tokens: {{7: 1{400 * '0'}}}",
        "data.caption_tokens: should be at most 1e+18",
    ),
    "a width without end": ("width: 128", f"width: 1{400 * '0'}", "should be greater than 0, at most 1e6"),
    "a ratio without end": (
        "width: 128",
        "mlp_ratio: 1e300",
        "mlp_ratio = 1e+300: should be greater than 0, at most 1e6",
    ),
    "a smaller vocabulary": ("width: 128", "vocab_size: 100", "vocab_size = 100: CLIP's tokenizer has 49408 tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_one_clear_line(case: str, write) -> None:
    old, new, message = WRONG[case]
    assert RECIPE.count(old) >= 1
    path = write(RECIPE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert message in text
    assert "\n" not in text
    assert "pydantic" not in text


def mistakes(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    return str(caught.value).splitlines()


def test_each_mistake_has_a_line(write) -> None:
    path = write(
        RECIPE.replace("batch: 64", "batch: x").replace("lr: 1e-3", "lr: y").replace("train: shards", "trian: s")
    )
    first, *lines = mistakes(path)
    assert first == f"{path}: 3 mistakes"
    assert [line.partition(":")[0] for line in lines] == [
        "  data.trian = 's/*.tar'",
        "  optimizer.batch = 'x'",
        "  optimizer.lr = 'y'",
    ], "the misspelt key is not counted a second time as missing"
    assert "did you mean 'train'?" in lines[0]


def test_a_long_list_of_mistakes_is_cut(write) -> None:
    first, *lines = mistakes(write(RECIPE + "".join(f"key{n}: 1\n" for n in range(22))))
    assert first.endswith("22 mistakes")
    assert len(lines) == 21
    assert lines[-1] == "  and 2 more"


def test_a_recipe_is_found_by_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("demo") == shipped("recipes")["demo"]
    (tmp_path / "demo").write_text("")
    assert find_recipe("demo") == Path("demo"), "a file that exists comes first"
    with pytest.raises(ConfigError, match=r"^cc3m_vti: no such file, and no recipe of that name.* cc3m_vit"):
        find_recipe("cc3m_vti")
    with pytest.raises(ConfigError, match="nearest are .*demo"):
        find_recipe("lost/other.yaml")


@pytest.mark.parametrize("content", ["", "- a", "just text"])
def test_a_file_that_is_no_mapping(content: str, write) -> None:
    with pytest.raises(ConfigError, match="should be a mapping with the keys name, seed, data"):
        load_recipe(write(content))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        load_recipe(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5e-3", 1.5e-3), ("0.001", 1e-3), ("1E-3", 1e-3), ("2", 2.0), ("1e+0", 1.0)]
)
def test_numbers(text: str, value: float, write) -> None:
    assert load_recipe(write(RECIPE.replace("lr: 1e-3", f"lr: {text}"))).optimizer.lr == value


@pytest.mark.parametrize(
    ("text", "value"), [("5M", 5_000_000), ("2.5k", 2500), ("1e6", 1_000_000), ("3_000", 3000), ("1B", 10**9)]
)
def test_counts(text: str, value: int, write) -> None:
    assert load_recipe(write(RECIPE.replace("2_000", text))).data.images == value


def test_overrides(write) -> None:
    recipe = load_recipe(
        write(),
        [
            "optimizer.lr=5e-4",
            "chain.links.1.train.epochs=30",
            "chain.links.0.alpha=0",
            "evaluation.sets.0.data=[a.tar, b.tar]",
            "engine.micro_batch=16",
            "family.members.0=vit_pico",
            "chain.links.0.model=vit_pico",
            "baselines.warmup={samples: 1k}",
        ],
    )
    assert recipe.optimizer.lr == 5e-4
    assert recipe.chain.links[1].train == Duration(epochs=30)
    assert recipe.chain.links[0].alpha == 0
    assert recipe.evaluation.sets[0].data == ["a.tar", "b.tar"]
    assert recipe.engine.micro_batch == 16
    assert list(recipe.family.specs()) == ["vit_pico", "wide"]
    assert recipe.baselines is not None
    assert recipe.baselines.warmup.to_steps(2000, 64) == 16


def test_validation_shards_may_be_one_path(write) -> None:
    assert load_recipe(write(), ["evaluation.validation=held/*.tar"]).evaluation.validation == ["held/*.tar"]
    assert load_recipe(write(), ["evaluation.validation=[a.tar, b.tar]"]).evaluation.validation == ["a.tar", "b.tar"]


@pytest.mark.parametrize("section", ["evaluation", "engine", "optimizer"])
def test_an_empty_section_is_its_defaults(section: str, write) -> None:
    recipe = load_recipe(write(), [f"{section}=null"])
    assert getattr(recipe, section) == type(getattr(recipe, section))()
    text = "\n".join(line for line in RECIPE.splitlines() if not line.startswith((section, "  sets")))
    assert load_recipe(write(f"{text}\n{section}:\n")) == load_recipe(write(text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "--set optimizer.lr: should be KEY=VALUE"),
        ("chain.links.7.lr=1", "'chain.links' has the items 0 to 1, not '7'"),
        ("chain.links.first.lr=1", "'chain.links' has the items 0 to 1, not 'first'"),
        ("evaluation.sets.4=1", "'evaluation.sets' has the items 0 to 0, not '4'"),
        ("name.first=1", "'name' is the value 'small', not a section"),
        ("optimizer.betas=[0.9", "--set optimizer.betas=[0.9: is not YAML"),
        ("optimizer.ir=1", "small.yaml: --set optimizer.ir = 1: unknown key (did you mean 'lr'?)"),
    ],
)
def test_wrong_overrides(override: str, message: str, write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(), [override])
    assert message in str(caught.value)


def test_result_fields_are_plain_and_leave_execution_out(write) -> None:
    recipe = load_recipe(write())
    fields = recipe.result_fields()
    assert set(fields) == {"seed", "data", "family", "chain", "baselines", "optimizer"}
    assert "train" not in fields["data"]
    assert "max_nonfinite" not in fields["optimizer"]
    assert fields["family"]["members"][1] == {"name": "wide", "preset": "vit_micro", "width": 128}
    assert fields["data"]["crop_scale"] == [0.9, 1.0]


def expanded(chain: dict[str, object], link: dict[str, object] | None = None) -> ExpandConfig:
    """What these two sections come to, through a recipe."""
    values = yaml.safe_load(RECIPE)
    values["optimizer"]["lr"] = 1e-3
    values["chain"]["links"][1] |= {"lr": 5e-4, "expand": link}
    values["chain"]["expand"] = chain
    recipe = parse_recipe(values)
    return expansion(recipe.chain.expand, recipe.chain.links[1].expand)


def test_the_first_that_says_something_of_a_tower_holds() -> None:
    assert expanded({}) == expanded({}, {}) == ExpandConfig()
    assert expanded({"width": "lemon"}) == ExpandConfig.both("lemon")
    assert expanded({"width": "lemon", "noise": 0.3}, {"depth": "stack"}) == ExpandConfig.both(
        "lemon", "stack", noise=0.3
    )
    inner = {"width": "lemon", "image": {"width": "net2net", "depth": "constant"}}
    assert expanded(inner) == ExpandConfig(TowerGrowth("net2net", "constant"), TowerGrowth("lemon"))
    # The order: the link's tower, the link, the chain's tower, the chain.
    assert expanded(inner, {"width": "duplicate"}).image == TowerGrowth("duplicate", "constant")
    assert expanded(inner, {"width": "duplicate"}).text == TowerGrowth("duplicate")
    link = {"depth": "interval", "zero_new_outputs": True, "text": {"depth": "stack"}}
    assert expanded(inner, link).image == TowerGrowth("net2net", "interval", True)
    assert expanded(inner, link).text == TowerGrowth("lemon", "stack", True)
    off = {"noise": 0.0, "reference_compatible": False, "zero_new_outputs": False}
    on = {"noise": 0.5, "reference_compatible": True, "zero_new_outputs": True}
    assert expanded(on, off) == ExpandConfig(noise=0.0)
    assert expanded(off, on) == ExpandConfig.both(zero_new_outputs=True, noise=0.5, reference_compatible=True)


def test_what_of_an_expansion_belongs_to_the_result() -> None:
    plain = {"width": "insert", "depth": "duplicate", "zero_new_outputs": False}
    assert expand_result(ExpandConfig()) == expand_result(ExpandConfig(noise=0.7)) == plain
    assert expand_result(ExpandConfig.both("lemon")) == {**plain, "width": "lemon", "noise": 0.1}
    assert expand_result(ExpandConfig.both("lemon", noise=0.0)) == {**plain, "width": "lemon"}
    assert expand_result(ExpandConfig(reference_compatible=True)) == {**plain, "reference_compatible": True}
    towers = ExpandConfig(TowerGrowth("interpolate"), TowerGrowth("duplicate"), noise=0.2)
    assert expand_result(towers) == {
        "image": {**plain, "width": "interpolate"},
        "text": {**plain, "width": "duplicate"},
        "noise": 0.2,
    }


def test_operators_in_words() -> None:
    assert expand_words(ExpandConfig(noise=0.7)) == "width insert, depth duplicate"
    assert expand_words(ExpandConfig(TowerGrowth("lemon", "stack", True), noise=0.2, reference_compatible=True)) == (
        "image tower: width lemon, depth stack, outputs of new layers zero; text tower: width insert, depth duplicate; "
        "noise 0.2; layers as in the authors' code"
    )


def test_the_example_of_growth_is_a_chain(write) -> None:
    before, _, after = RECIPE.partition("chain:")
    family = before.replace("{name: wide, preset: vit_micro, width: 128}", "vit_micro, vit_mini")
    recipe = load_recipe(write(family + EXPANSION_EXAMPLE + after[after.index("baselines:") :]))
    first, second, third = (expansion(recipe.chain.expand, link.expand) for link in recipe.chain.links)
    assert first == ExpandConfig()
    assert second == ExpandConfig(TowerGrowth(zero_new_outputs=True), TowerGrowth("lemon", zero_new_outputs=True))
    assert third == ExpandConfig.both("net2net", noise=0.05)


def test_the_reference_of_fields_is_current() -> None:
    path = ROOT / "docs" / "recipes.md"
    assert path.read_text(encoding="utf-8") == reference(), "run: python -m compt.recipe.reference docs/recipes.md"
    assert "|  |" not in reference(), "a field has no docstring"


@pytest.mark.parametrize(
    ("batch", "world", "micro", "split"), [(64, 1, None, (64, 64)), (64, 2, 8, (32, 8)), (64, 4, 100, (16, 16))]
)
def test_split_batch(batch: int, world: int, micro: int | None, split: tuple[int, int]) -> None:
    assert split_batch(batch, world, micro) == split


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.batch 64 cannot be shared evenly by 3 processes"):
        split_batch(64, 3, None)
    with pytest.raises(ConfigError, match=r"engine\.micro_batch 24 does not divide the 64 images"):
        split_batch(64, 1, 24)


def test_plain_values_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"^somewhere: 4 mistakes\n  name: is missing"):
        parse_recipe({}, "somewhere")


MERGES = [f"a{at}: &a{at}\n  <<: [{', '.join(10 * [f'*a{at - 1}'])}]\n" for at in range(1, 20)]
"""Each mapping holds the one before ten times."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + 5000 * "[" + 5000 * "]", "is nested too deeply to be a recipe"),
        ("seed: " + 5000 * "1", "a value cannot be read: Exceeds the limit"),
        ("name: 2001-13-45", "a value cannot be read: month must be in 1..12"),
        ("a0: &a0 {x: 1}\n" + "".join(MERGES), "line 3: '<<' is not supported; write the keys themselves"),
    ],
    ids=["deep", "long", "date", "merges"],
)
def test_yaml_that_python_cannot_hold_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^r\.yaml: {message}") as caught:
        read_yaml(text, "r.yaml")
    assert "\n" not in str(caught.value)


def test_the_schedule_of_the_learning_rate() -> None:
    def read(schedule: object) -> Recipe:
        values = read_yaml(RECIPE, "small.yaml")
        values["optimizer"] |= {} if schedule is None else {"schedule": schedule}
        return parse_recipe(values)

    assert "schedule" not in read(None).optimizer.result_fields()  # hashes of older runs stay
    linear = read("linear").optimizer
    assert linear.schedule == read({"shape": "linear"}).optimizer.schedule
    assert linear.result_fields()["schedule"]["shape"] == "linear"
    resolved = read(None).optimizer.schedule.model_dump()
    assert read(resolved) == read(None)
    for value, said in (
        ({"shape": "constant", "end": 0.1}, "end = 0.1: a constant learning rate has no other one at the end"),
        ({"decay": 0.1}, "decay = 0.1: only wsd has one, and the shape is cosine"),
        ("linaer", "did you mean 'linear'"),
        ({"shape": "wsd", "decay": 0}, "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            read(value)
