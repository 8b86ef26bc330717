"""Whether a decoder changes the accuracy of a chain: the demo's chain with `pillow` and `torch`, over the same seeds.

`python -m benchmarks.data.accuracy` writes docs/results/decoders. It writes the emoji set again as JPEGs of 96 pixels,
of which the decoders make different pixels (Pillow drafts at half the size), and trains all links for each seed and
decoder. All models are scored by one decoder. It needs data/emoji (`compt data emoji`), takes 3 minutes a run on two
idle cores, and resumes after a stop.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image

from benchmarks.common import Result, one_line, show, write
from benchmarks.data.study import OUT
from compt.chain.record import read_manifest
from compt.cli.main import app
from compt.errors import RunError
from compt.files import new_folder
from compt.text import TextTable

SOURCE, RUNS, TESTED = Path("data/emoji"), Path("runs/decoders"), "test_style"
DECODERS = ("pillow", "torch")
EPOCHS = {"vit_nano": 20, "vit_micro": 5, "vit_mini": 7}
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 95 %, 1 to 9 degrees of freedom


def write_jpegs(folder: Path) -> None:
    """The emoji shards of `SOURCE` with larger JPEGs in place of the PNGs. Raises RunError."""
    if not list(SOURCE.glob("train/*.tar")):
        raise RunError(f"{SOURCE} is missing: `compt data emoji` makes it")
    with new_folder(folder) as made:
        for split in ("train", TESTED):
            (made / split).mkdir()
            for path in (SOURCE / split).glob("*.txt"):
                shutil.copyfile(path, made / split / path.name)
            for path in sorted((SOURCE / split).glob("*.tar")):
                with tarfile.open(path) as source, tarfile.open(made / split / path.name, "w") as out:
                    for member in source:
                        file = source.extractfile(member) or io.BytesIO()
                        if member.name.endswith(".png"):
                            image, file = Image.open(file).resize((96, 96), Image.Resampling.LANCZOS), io.BytesIO()
                            image.convert("RGB").save(file, "JPEG", quality=90)
                            member.name, member.size = f"{member.name[:-4]}.jpg", file.tell()
                            file.seek(0)
                        out.addfile(member, file)


def train(seed: int, decoder: str, epochs: float) -> list[dict[str, Any]]:
    """Train a chain, or what is missing of it. Returns the top-1 of each link, in percent."""
    lengths = {model: epochs * length for model, length in EPOCHS.items()}
    links = [{"model": model, "train": {"epochs": n}, "warmup": {"epochs": n / 10}} for model, n in lengths.items()]
    scored = {"sets": [{"name": TESTED, "data": f"{RUNS}/data/{TESTED}/*.tar"}], "primary": TESTED}
    changes = [f"seed={seed}", f"data.decoder={decoder}", f"data.train={RUNS}/data/train/*.tar", "baselines=null"]
    changes += [f"chain.links={json.dumps(links)}", f"evaluation={json.dumps(scored)}"]
    run = RUNS / f"epochs-{epochs:g}" / f"{decoder}-{seed}"
    app(["chain", "demo", "--run-folder", str(run), *(f"--set={each}" for each in changes)], standalone_mode=False)
    jobs = {model: read_manifest(run / "jobs" / f"{at}-{model}") for at, model in enumerate(EPOCHS, 1)}
    return [
        {
            "seed": seed,
            "decoder": decoder,
            "link": model,
            "top1": job["scores"][TESTED]["top1"],
            "finished": job["finished"],
            **{key: job["starts"][-1]["machine"][key] for key in ("device", "torch")},
        }
        for model, job in jobs.items()
    ]


def table(rows: Sequence[dict[str, Any]], title: str) -> TextTable:
    """The mean of each decoder, and the difference with a 95 % interval over seeds."""
    body = []
    for link in EPOCHS:
        first, second = ([row["top1"] for row in rows if (row["link"], row["decoder"]) == (link, d)] for d in DECODERS)
        by_seed = [other - one for one, other in zip(first, second, strict=True)]
        middle, half = mean(by_seed), _T[len(by_seed) - 2] * stdev(by_seed) / len(by_seed) ** 0.5
        shown = (mean(first), mean(second), stdev(first), middle, middle - half, middle + half)
        body.append((link, *(f"{value:.2f}" for value in shown)))
    header = ("Link", *DECODERS, "pillow's spread of seeds", "torch minus pillow", "95 % from", "to")
    return TextTable(title, header, body, left=1)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), help="runs of each decoder (default: 5)")
    parser.add_argument("--epochs", type=float, default=1.0, help="share of the epochs (default: 1; to try it: 0.02)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the results (default: the committed one)")
    asked = parser.parse_args(argv)
    with one_line():
        if not (RUNS / "data").exists():
            write_jpegs(RUNS / "data")
        runs = itertools.product(range(asked.seeds), DECODERS)
        rows = [row for seed, decoder in runs for row in train(seed, decoder, asked.epochs)]
        lengths = " → ".join(f"{asked.epochs * length:g}" for length in EPOCHS.values())
        found = table(rows, f"Top-1 on {TESTED}, %: links of {lengths} epochs, {asked.seeds} seeds")
        last = max(rows, key=lambda row: row["finished"])
        about = f"Trained until {last['finished'][:10]} on {last['device']}, torch {last['torch']}, seeds 0 to "
        about += f"{asked.seeds - 1}: `python -m benchmarks.data.accuracy`."
        records = {"scores": rows}
        show(result := Result("decoders", "Accuracy with two decoders", (), (found,), records, (about,)))
        print(f"written: {write(result, asked.out)}")


if __name__ == "__main__":
    main()
