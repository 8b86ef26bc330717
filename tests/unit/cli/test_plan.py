"""`compt plan`: what it shows, what it refuses, and that it does not need torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from compt.cli.design.tables import DesignRequest
from compt.cli.main import main
from compt.cost.gpus import DEVICES
from compt.models.presets import OPENAI_MEAN, OPENAI_STD, PRESETS, ModelSpec
from compt.plan.forecast import Machine
from tests.unit.plan.test_forecast import SECONDS, VALUES, measured

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.yaml"))

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Plan:
    """Run `compt plan` on `VALUES`, or on a recipe of the repository; returns exit code, output, errors."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(VALUES))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str, recipe: str | None = None) -> tuple[int, str, str]:
        monkeypatch.chdir(ROOT if recipe else tmp_path)
        monkeypatch.setattr(sys, "argv", ["compt", "plan", recipe or "r.yaml", *words])
        with pytest.raises(SystemExit) as left:
            main()
        shown = capsys.readouterr()
        return int(left.value.code or 0), shown.out, shown.err

    return run


def as_json(plan: Plan, *words: str, recipe: str | None = None) -> dict[str, Any]:
    code, text, errors = plan(*words, "--json", recipe=recipe)
    assert (code, errors) == (0, "")
    values: dict[str, Any] = json.loads(text)
    return values


def test_the_defaults_are_a_node_of_the_paper_s_gpus(plan: Plan) -> None:
    values = as_json(plan)
    assert {key: values["machine"][key] for key in ("kind", "gpus")} == {"kind": "a100-80", "gpus": 8}
    assert {(job["engine"], job["recompute"]) for job in values["jobs"]} == {("ddp", False)}
    assert [job["kind"] for job in values["jobs"]] == ["link", "link", "link"], "what `compt chain` trains"
    for words in (("--controls",), ("--baselines", "--set", "baselines.seeds=[1]")):
        assert [job["kind"] for job in as_json(plan, *words)["jobs"]].count("control") == 1
    assert as_json(plan, "--set", "optimizer.batch=13")["machine"]["gpus"] == 1
    code, _, error = plan("--controls", "--set", "baselines.controls=[]")
    assert code == 2
    assert "baselines.controls: is missing; it names the controls, such as [equal_macs]" in " ".join(error.split())


def test_the_options_are_heard(plan: Plan) -> None:
    values = as_json(plan, "--kind", "H100", "--gpus", "4", "--baselines", "--set", "data.captions=1")
    assert (values["machine"]["kind"], values["machine"]["gpus"], values["captions"]) == ("h100", 4, 1)
    assert [job["kind"] for job in values["jobs"]].count("baseline") == 3
    hours = values["totals"]["chain"]["hours"]
    assert hours["wall_hours"] == pytest.approx(hours["gpu_hours"] / 4)
    exact, paper = (plan("--mode", mode)[1] for mode in ("exact", "paper"))
    assert "mode 'exact'" in exact
    assert "mode 'paper'" in paper
    assert "Memory with zero3, in GB" in plan("--memory", "zero3")[1]
    assert "Memory with" not in exact


@pytest.mark.parametrize("recipe", ["recipes/demo.yaml", "recipes/emoji.yaml"])
def test_a_recipe_for_a_cpu_shows_gpus_only_when_asked(plan: Plan, recipe: str) -> None:
    assert as_json(plan, recipe=recipe)["machine"] is None
    assert "add --kind" in plan(recipe=recipe)[1]
    for words in (("--kind", "h200"), ("--gpus", "2"), ("--set", "engine.device=cuda")):
        assert as_json(plan, *words, recipe=recipe)["machine"] is not None
    assert "Memory with ddp" in plan("--memory", "ddp", recipe=recipe)[1]


def test_what_the_machine_lacks(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before a job waits in a queue. Shards may lie on disks that only the nodes have."""
    (tmp_path / "there").mkdir()
    (tmp_path / "0.tar").touch()
    sets = (
        "evaluation.sets=[{name: one, data: there}, {name: two, data: 'gone/*.tar'}, {name: far, data: 's3://a/b.tar'}]"
    )
    asked = ("--set", "data.train='{0,1}.tar'", "--set", sets)
    assert plan(*asked)[::2] == (0, "")
    assert plan(*asked, "--here")[:2] == (0, plan(*asked)[1])
    assert [record.getMessage() for record in caplog.records] == [
        "r.yaml: data.train: there is no shard '1.tar' (from '{0,1}.tar') on this machine",
        "r.yaml: evaluation set 'two': no shard matches 'gone/*.tar' on this machine",
    ]
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    code, _, said = plan("--set", "data.decoder=dali", "--here")
    assert code == 2
    assert "data.decoder: dali needs NVIDIA DALI" in said


def test_measured_speeds(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    path.write_text(measured({**SECONDS, "1": 0.36}).model_dump_json())
    values = as_json(plan, "--throughput", str(path))
    assert values["machine"]["kind"] == "a100-80"
    assert values["jobs"][1]["hours"]["gpu_hours"] == pytest.approx(4 * 64_000 * 1e-4)
    assert values["jobs"][1]["hours"]["kind"] == "measured"
    text = plan("--throughput", str(path))[1]
    assert re.search(r"2-two +25\.6 +23\.0-30\.7 ", text)
    assert "measured NVIDIA A100-SXM4-80GB, 2026-01-02. Wall" in text
    assert (
        "2026-01-02 (measured at batch 80; this plan has 160 per GPU)"
        in plan("--throughput", str(path), "--gpus", "4")[1]
    )
    pieces = plan("--throughput", str(path), "--set", "engine.micro_batch=40")[1]
    assert "captions of the whole context, micro-batches of 40 of 1-one, 2-two," in pieces
    assert "measured NVIDIA" not in pieces
    path.write_text(measured({"one": 1e-3}, kind="h100").model_dump_json())
    assert as_json(plan, "--throughput", str(path))["machine"]["kind"] == "h100"
    text = plan("--throughput", str(path))[1]
    assert "no measurement in bf16 with 2 captions of the whole context of 2-two, 3-three" in text
    assert "baseline-two-s0, baseline-three-s0." in text
    assert "~ marks a projection" in text
    assert "of the authors' program, host and loaders included; this one may be faster or slower" in text
    assert "of the authors' program" not in plan("--set", "engine.device=cpu")[1]


def test_warnings_say_what_would_fit(plan: Plan) -> None:
    words = ("--kind", "a100-40", "--gpus", "1", "--set", "optimizer.batch=6400")
    code, text, _ = plan(*words)
    assert code == 0
    text = " ".join(text.split())
    said = r"Warning: does not fit the 39\.2 GB .*3-three \([\d,.]+ GB with ddp\).*engine\.micro_batch: (\d+)"
    found = re.search(said, text)
    assert found is not None
    assert as_json(plan, *words)["too_large"]["micro_batch"] == int(found[1])
    few = " ".join(plan(*words[:4], "--set", "optimizer.batch=640")[1].split())
    assert re.search(r"GB with ddp\)\. .*engine\.micro_batch: \d+; or, engine\.recompute: true", few)
    assert "Warning" not in plan(*words[:4], "--set", "optimizer.batch=640", "--set", "engine.recompute=true")[1]
    assert "Warning" not in plan(*words, "--set", f"engine.micro_batch={found[1]}")[1]


# What is refused: one line that names file or option, key, value, and what would be right.


REFUSED = {
    "no images": (["--set", "data.images=0"], r"r\.yaml: --set data\.images = 0: should be greater than 0"),
    "negative epochs": (
        ["--set", "chain.links.1.train.epochs=-2"],
        r"r\.yaml: --set chain\.links\.1\.train\.epochs = -2: should be greater than or equal to 0",
    ),
    "a width that cannot be": (
        ["--set", "family.members.1.width=100"],
        r"r\.yaml: family\.members\.1: model vit_s16: width 100 is not 1 x 64",
    ),
    "patches that cannot be": (
        ["--set", "family.common={patch_size: 15}"],
        r"r\.yaml: family\.members\.0: model vit_t16: image_size 224 is not a multiple of patch_size 15",
    ),
    "an unknown model": (
        ["--set", "family.members.1.preset=vit_s61"],
        r"r\.yaml: family\.members\.1: unknown model 'vit_s61' \(did you mean 'vit_s16'\?\)",
    ),
    "a chain that shrinks": (
        ["--set", "family.members.1.width=128"],
        r"r\.yaml: chain\.links\.1\.model = 'two': its width 128 is smaller than the 192 of 'one'",
    ),
    "no GPUs": (["--gpus", "0"], r"--gpus 0: should be from 1 to the 640 of optimizer\.batch in r\.yaml"),
    "negative GPUs": (["--gpus", "-8"], r"--gpus -8: should be from 1 to the 640"),
    "more GPUs than pictures": (["--gpus", "641"], r"--gpus 641: should be from 1 to the 640"),
    "GPUs that do not divide the batch": (
        ["--gpus", "6"],
        r"r\.yaml: optimizer\.batch 640 cannot be shared evenly by 6 processes; 5 or 8 can share it",
    ),
    "a micro-batch that does not divide": (
        ["--set", "engine.micro_batch=48"],
        r"r\.yaml: engine\.micro_batch 48 does not divide the 80 images of a process; take 40",
    ),
    "no micro-batch": (
        ["--set", "engine.micro_batch=0"],
        r"r\.yaml: --set engine\.micro_batch = 0: should be greater than 0",
    ),
    "no speeds": (["--throughput", "none.json"], r"--throughput: cannot read none\.json: No such file or directory"),
    "speeds of another kind": (
        ["--kind", "h200", "--throughput", "a100.json"],
        r"--throughput: a100\.json was measured on NVIDIA A100-SXM4-80GB, not on H200 141 GB SXM \(h200\)",
    ),
    "speeds of no kind": (
        ["--throughput", "cpu.json"],
        r"--throughput cpu\.json: NVIDIA A100\S+ has no datasheet here: `compt bench gpu-hours` takes its speeds$",
    ),
    "damaged speeds": (
        ["--throughput", "torn.json"],
        r"--throughput: torn\.json is not a throughput file of compt",
    ),
    "no baselines": (["--baselines", "--set", "baselines=null"], r"r\.yaml: baselines: is missing"),
    "no chain": (["--set", "chain=3"], r"r\.yaml: --set chain = 3: should be a section with the keys"),
    **{
        f"{option} without --auto": ([option, value], rf"{option} {value}: is for --auto, which is missing")
        for option, value in (
            ("--objective", "cost"),
            ("--members", "4"),
            ("--budget", r"50\.0"),
            ("--runs", "runs/a"),
            ("--in", "hours"),
            ("--runs-on", "val"),
            ("--out", "best"),
        )
    },
    "--mode with --json": (
        ["--json", "--mode", "paper"],
        r"--mode paper: is for tables; --json always has both modes$",
    ),
    "--memory with --json": (
        ["--json", "--memory", "zero3"],
        r"--memory zero3: is for tables; --json always has every engine$",
    ),
    "--baselines with --auto": (["--auto", "--baselines"], r"--baselines: does not go with --auto"),
    "--mode with --auto": (["--auto", "--mode", "paper"], r"--mode paper: does not go with --auto"),
    "--memory with --auto": (["--auto", "--memory", "ddp"], r"--memory ddp: does not go with --auto"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(plan: Plan, case: str, tmp_path: Path) -> None:
    words, message = REFUSED[case]
    speeds = measured({"one": 1e-3})
    (tmp_path / "a100.json").write_text(speeds.model_dump_json())
    (tmp_path / "cpu.json").write_text(speeds.model_copy(update={"kind": None}).model_dump_json())
    (tmp_path / "torn.json").write_text(speeds.model_dump_json()[:-40])
    code, text, errors = plan(*(word.replace("\\", "") for word in words))
    assert (code, text) == (2, "")
    assert re.match(rf"compt: {message}", errors), errors
    assert errors.count("\n") == 1


# --auto


def test_auto_hands_on_what_was_asked(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    fake = SimpleNamespace(run_auto=lambda *words, **options: calls.append((words, options)))
    monkeypatch.setitem(sys.modules, "compt.cli.design.command", fake)
    assert plan("--auto")[0] == 0
    (recipe, source, *asked), options = calls.pop()
    assert (recipe.name, source) == ("three", Path("r.yaml"))
    data = "The shards are not indexed here: the number of images and the tokens are the recipe's."
    assert asked == [DesignRequest("cost", data=data), Machine(DEVICES["a100-80"], 8)]
    assert options == {"out": None, "as_json": False}
    speeds = measured({"one": 1e-3}, kind="h100")
    (tmp_path / "h100.json").write_text(speeds.model_dump_json())
    words = "--auto --objective budget --members 3 --budget 120 --runs a --runs b --out best.yaml --json --gpus 4"
    words += " --in hours --runs-on val"
    assert plan(*words.split(), "--throughput", "h100.json", "--set", "name=other")[0] == 0
    (recipe, _, *asked), options = calls.pop()
    assert recipe.name == "other"
    runs = (Path("a"), Path("b"))
    request = DesignRequest("budget", "hours", 3, 120.0, runs, "val", data)
    assert asked == [request, Machine(DEVICES["h100"], 4, speeds)]
    assert options == {"out": Path("best.yaml"), "as_json": True}


# Without torch


NO_TORCH = (
    "import sys\n"
    "from compt.cli.main import main\n"
    "for recipe in sys.argv[1:]:\n"
    "    for more in ([], ['--json', '--baselines', '--kind', 'h100']):\n"
    "        sys.argv = ['compt', 'plan', recipe, *more]\n"
    "        try:\n"
    "            main()\n"
    "        except SystemExit as left:\n"
    "            assert left.code == 0, (recipe, left.code)\n"
    "    heavy = {'torch', 'open_clip', 'timm', 'matplotlib'} & set(sys.modules)\n"
    "    assert not heavy, (recipe, sorted(heavy))\n"
)


def without_torch(*recipes: str, cwd: Path = ROOT) -> str:
    command = [sys.executable, "-c", NO_TORCH, *recipes]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_shipped_recipe_takes_torch() -> None:
    assert len(RECIPES) >= 7
    text = without_torch(*RECIPES)
    assert all(f"Plan of {Path(recipe).stem}\n" in text for recipe in RECIPES)


def begun(folder: Path, start: str) -> dict[str, Any]:
    """A recipe that starts from a model folder."""
    values = {**VALUES, "chain": {"from": start, "links": VALUES["chain"]["links"][1:]}}
    (folder / "r.yaml").write_text(yaml.safe_dump(values))
    return values


def test_a_model_of_ours_to_start_from_takes_no_torch(plan: Plan, tmp_path: Path) -> None:
    begun(tmp_path, "start")
    manifest = {
        "format": "compt-model",
        "format_version": 1,
        "spec": PRESETS["vit_t16"].to_dict(),
        "hash": "abc",
        "preprocess": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
    }
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "manifest.json").write_text(json.dumps(manifest))
    text = without_torch("r.yaml", cwd=tmp_path)
    assert "No figure includes the cost of training start." in " ".join(text.split())
    first = as_json(plan)["jobs"][0]
    assert (first["name"], first["start"], first["teacher"]) == ("1-two", "start", None)
    assert first["macs"]["exact"]["teacher_share"] > 0
    assert first["disk"]["initial_bytes"] > 0


def test_no_model_to_start_from(plan: Plan, tmp_path: Path) -> None:
    begun(tmp_path, "none")
    code, _, errors = plan()
    assert code == 2
    assert errors.startswith("compt: r.yaml: chain.from = 'none': cannot read none/manifest.json (No such file")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "manifest.json").write_text("{")
    assert plan()[0] == 2


def test_a_model_of_open_clip_to_start_from(plan: Plan, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from compt.models.clip import build

    small = ModelSpec.from_dict({**PRESETS["vit_pico"].to_dict(), "name": "outside"})
    values = begun(tmp_path, "outside")
    values["family"] = {"members": [{"name": "two", "preset": "vit_nano"}, {"name": "three", "preset": "vit_mini"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "open_clip_config.json").write_text(json.dumps({"model_cfg": small.open_clip_config()}))
    state = {name: tensor.contiguous() for name, tensor in build(small).state_dict().items()}
    save_file(state, tmp_path / "outside" / "open_clip_model.safetensors")
    first = as_json(plan)["jobs"][0]
    assert (first["name"], first["start"]) == ("1-two", "outside")
    assert first["macs"]["exact"]["teacher_forward_macs"] > 0


# The page


def keys(value: Any, path: str = "") -> set[str]:
    """Every key of a JSON structure: jobs[].macs.MODE.total_macs; a key that is data is shown by its kind."""
    if isinstance(value, list):
        return {key for item in value if isinstance(item, dict) for key in keys(item, f"{path}[]")}
    if not isinstance(value, dict):
        return set()
    found = set()
    for name, item in value.items():
        shown = "MODE" if name in ("exact", "paper") else "ENGINE" if path.endswith(".memory") else name
        here = f"{path}.{shown}" if path else shown
        found |= {here} | (
            set() if shown in ("spec", "expand", "inexact", "cost", "caption_tokens") else keys(item, here)
        )
    return found


def test_the_page_names_every_key_of_the_json(plan: Plan) -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8").partition("## JSON")[2]
    named = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    words = ("--kind", "a100-40", "--gpus", "1", "--set", "optimizer.batch=6400", "--baselines")
    words = (*words, "--set", "engine.teacher_cache=1G")
    found = keys(as_json(plan, *words))
    groups = {f"totals.{name}" for name in ("chain", "individual", "run")}
    spelt = {re.sub(r"^totals\.(chain|individual|run)\.", "totals.GROUP.", key) for key in found - groups}
    spelt = {re.sub(r"\.(stored|recomputed)\.", ".KEPT.", key) for key in spelt}
    assert spelt | {"totals.GROUP"} == named | {"totals.GROUP"}


def test_the_page_shows_what_the_command_prints(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    found = re.search(r"`COLUMNS=(\d+) compt plan (\S+)` prints:\n\n```text\n(.*?)```", page, re.DOTALL)
    assert found is not None
    columns, recipe, shown = found.groups()
    run = plan  # sets its own width first
    monkeypatch.setenv("COLUMNS", columns)
    text = run(recipe=recipe)[1]
    printed = "\n".join(line.rstrip() for line in text.splitlines())
    assert printed.strip() == shown.strip(), "docs/planning.md shows older numbers: print them again"


def test_an_engine_that_cannot_run_is_refused(plan: Plan, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        code, text, errors = plan(*words)
        assert (code, text) == (2, ""), (words, text, errors)
        return errors

    zero = ("--set", "engine.name=zero1", "--set", "engine.deepspeed_config=ds.json")
    cpu = ("--set", "engine.device=cpu")
    for words in (zero, (*zero, *cpu), (*zero, "--gpus", "2", "--auto")):
        assert "r.yaml: ds.json: engine.deepspeed_config cannot be read" in refused(*words)
    batch = int(VALUES["optimizer"]["batch"])
    text = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": batch // 2}
    (tmp_path / "ds.json").write_text(json.dumps(text))
    assert "ds.json: train_micro_batch_size_per_gpu" in refused(*zero, "--gpus", "4")
    # With a given number of GPUs the recipe is wrong; with the default number it only may be.
    assert plan(*zero, "--gpus", "2")[0] == 0
    assert plan(*zero, *cpu)[0] == 0
    (tmp_path / "ds.json").write_text(json.dumps({**text, "zero_optimization": {"stage": 2}}))
    assert "ds.json: zero_optimization.stage" in refused(*zero, *cpu)
    replicas = ("--set", "engine.name=fsdp2", "--set", "chain.links.2.engine={fsdp2: {replicas: 3}}")
    assert "engine.fsdp2.replicas = 3 does not divide the 2 processes" in refused(*replicas, "--gpus", "2")
    assert plan(*replicas, *cpu)[0] == 0


def test_what_the_memory_leaves_out_is_said(plan: Plan) -> None:
    assert "Not counted" not in plan()[1]
    own = ("--set", "chain.links.2.engine={name: fsdp2, fsdp2: {cpu_offload: true}, checkpoint_every: {steps: 7}}")
    text = " ".join(plan(*own)[1].split())
    assert "Not counted, in 3-three: engine.fsdp2.cpu_offload" in text
    pieces = ("--set", "engine={name: fsdp2, micro_batch: 8, fsdp2: {reshard_after_forward: false}}", "--gpus", "8")
    assert "whole gradients between micro-batches" in " ".join(plan(*pieces)[1].split())
    assert "1000 steps (1-one, 2-two) or 7 steps (3-three)" in text


@pytest.mark.parametrize("key", ["find_micro_batch", "tune"])
def test_a_micro_batch_that_is_searched_has_a_note_and_no_warning(plan: Plan, key: str) -> None:
    note = "Not counted, in 1-one, 2-two, 3-three: the micro-batch, which is searched before training"
    large = ("--kind", "a100-40", "--gpus", "1", "--set", "optimizer.batch=6400")
    assert "Warning: does not fit" in plan(*large)[1]
    words = (*large, "--set", f"engine.{key}=true")
    text = " ".join(plan(*words)[1].split())
    assert f"{note}: MACs and hours are without a second forward pass." in text
    assert "Warning: does not fit" not in text
    # With a limit, the plan counts the pass that it needs.
    assert note not in " ".join(plan(*words, "--set", "engine.micro_batch=32")[1].split())
