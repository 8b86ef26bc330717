"""The loaders that are compared, each as its own project builds it. They give batches of images and token ids."""

from __future__ import annotations

import functools
import importlib
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from compt.data.index import open_index
from compt.data.loaders import train_loader
from compt.recipe.schema import DECODERS

CONTEXT = 77
SCALE = (0.9, 1.0)
"""The share of an image's area that a crop has: open_clip's default."""
SEED = 0


@dataclass(frozen=True)
class Given:
    """What every loader gets. files: a folder with the members of the tars as files."""

    tars: Path
    files: Path
    batch: int
    size: int


def _compt(given: Given, decoder: str, workers: int) -> Iterator[Any]:
    index = open_index("*.tar", given.tars)
    steps = 1 << 40  # it never ends
    return iter(
        train_loader(
            index,
            seed=SEED,
            batch=given.batch,
            image_size=given.size,
            captions=1,
            context_length=CONTEXT,
            start_step=0,
            total_steps=steps,
            crop_scale=SCALE,
            workers=workers,
            decoder=decoder,
        )
    )


def _openclip_data() -> ModuleType:
    """`open_clip_train.data`, with what it needs besides its own code."""
    import torchvision  # noqa: F401
    import webdataset

    try:
        import pandas  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:  # only its dataset of CSV files uses pandas
        sys.modules["pandas"] = ModuleType("pandas")
        try:
            data = importlib.import_module("open_clip_train.data")
        finally:
            del sys.modules["pandas"]
    else:
        data = importlib.import_module("open_clip_train.data")
    expander = vars(data)["tar_file_expander"]
    if int(webdataset.__version__.partition(".")[0]) >= 1 and not isinstance(expander, functools.partial):
        # webdataset 1 marks the end of a shard with an empty sample, on which open_clip 3.3 fails.
        vars(data)["tar_file_expander"] = functools.partial(expander, eof_value=None)
    return data


def _openclip(given: Given) -> Iterator[Any]:
    """OpenCLIP's own pipeline, as its `main.py` makes it for `--dataset-type webdataset --workers 1`."""
    import open_clip

    shards = sorted(given.tars.glob("*.tar"))
    options = SimpleNamespace(
        train_data=f"{given.tars}/{{{shards[0].stem}..{shards[-1].stem}}}.tar",
        train_num_samples=1 << 30,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=SEED,
        batch_size=given.batch,
        world_size=1,
        workers=1,
    )
    transform = open_clip.image_transform(given.size, is_train=True, aug_cfg={"scale": SCALE})
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    info = _openclip_data().get_wds_dataset(options, transform, is_train=True, tokenizer=tokenizer)
    return iter(info.dataloader)


class _Files(torch.utils.data.Dataset[Any]):
    """Images in a folder and the captions beside them, as torchvision's `ImageFolder` reads images."""

    def __init__(self, given: Given) -> None:
        import open_clip

        self._paths = sorted(given.files.glob("*.jpg"))
        self._transform = open_clip.image_transform(given.size, is_train=True, aug_cfg={"scale": SCALE})
        self._tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, at: int) -> Any:
        from torchvision.datasets.folder import default_loader

        path = self._paths[at]
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        return self._transform(default_loader(str(path))), self._tokenizer(caption)[0]


def _torchvision(given: Given) -> Iterator[Any]:
    loader = torch.utils.data.DataLoader(
        _Files(given), given.batch, shuffle=True, num_workers=1, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def _dali(given: Given) -> Iterator[Any]:
    """DALI's reader of tars, its random crop and resize: uint8 [B, 3, size, size]. The captions are tokenized here."""
    import open_clip
    from nvidia.dali import Pipeline, fn, types

    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    pipeline: Any = Pipeline(given.batch, 1, device, seed=SEED)
    with pipeline:
        paths = [str(path) for path in sorted(given.tars.glob("*.tar"))]
        encoded, captions = fn.readers.webdataset(paths=paths, ext=["jpg", "txt"], random_shuffle=True)
        crop = fn.decoders.image_random_crop(
            encoded,
            device="cpu" if device is None else "mixed",
            random_area=list(SCALE),
            random_aspect_ratio=[3 / 4, 4 / 3],
            output_type=types.RGB,
        )
        resized = fn.resize(crop, size=(given.size, given.size), interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(fn.transpose(resized, perm=[2, 0, 1]), captions)
    pipeline.build()
    while True:
        images, captions = pipeline.run()
        texts = [bytes(captions.at(at)).decode() for at in range(given.batch)]
        yield torch.utils.dlpack.from_dlpack(images.as_tensor()), tokenizer(texts)


OPENCLIP = "OpenCLIP, webdataset"
WAYS: dict[str, Callable[[Given], Iterator[Any]]] = {
    OPENCLIP: _openclip,
    "torchvision, files": _torchvision,
    "DALI, webdataset reader": _dali,
    **{
        f"compt, {name}, {workers} worker{'' if workers == 1 else 's'}": functools.partial(
            _compt, decoder=name, workers=workers
        )
        for name in DECODERS.table
        for workers in (1, 0)
    },
}
ON_GPU = " on a GPU"
WAYS |= {way + ON_GPU: WAYS[way] for way in ("DALI, webdataset reader", "compt, dali, 1 worker")}


def lacking(way: str) -> str | None:
    """Import what a way needs. The name of what this environment lacks, or None."""
    if way.endswith(ON_GPU) and not torch.cuda.is_available():
        return "a CUDA device"
    names = ["open_clip", "torchvision.datasets"]
    names += ["nvidia.dali.fn"] if "dali" in way.lower() else []
    names += ["webdataset", "open_clip_train"] if way == OPENCLIP else []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            return name.removesuffix(".fn")
    if way == OPENCLIP:
        _openclip_data()
    return None


def unpack(tars: Path, files: Path) -> None:
    """Write the members of the tars as files."""
    files.mkdir()
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as tar:
            tar.extractall(files, filter="data")
