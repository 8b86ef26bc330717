"""How a model expects its images: colours and resizing, as open_clip and Hugging Face write it down."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from compt.errors import ArtefactError
from compt.models.presets import OPENAI_MEAN, OPENAI_STD

INTERPOLATIONS = {"bilinear": 2, "bicubic": 3}
"""Kernels of a resize, with Pillow's numbers, which Hugging Face's configs hold."""
RESIZE_MODES = ("shortest", "longest", "squash")

_HF_TYPE = "CLIPImageProcessor"
# What Hugging Face's class does where a config leaves a key out, and the only values that compt supports.
_HF_FIXED = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_pad": (False, None),
    "rescale_factor": (1 / 255,),
    "default_to_square": (False, None),
    "use_square_size": (False, None),
}


@dataclass(frozen=True)
class Preprocess:
    """From decoded images to a model's input; the size in pixels is the model's own.

    `mean`, `std`: of red, green and blue, from 0 to 1. `resize_mode`: `shortest` resizes the shorter side and cuts out
    the centre, `longest` resizes the longer side and pads with the grey value `fill_color` (0 to 255), `squash` changes
    the aspect ratio. The names are those of open_clip's `preprocess_cfg`.
    """

    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Preprocess:
        """Read open_clip's `preprocess_cfg`. None and missing keys mean the default, as they do in open_clip.

        `size` is not read: open_clip takes the model's, and so does compt. Raises ArtefactError for an unknown key or
        an unsupported value; it begins with `where`.
        """
        given = {key: value for key, value in values.items() if value is not None and key != "size"}
        known = ("mode", *(field.name for field in fields(cls)))
        for key, value in given.items():
            if key not in known:
                keys = ", ".join(known)
                raise ArtefactError(f"{where}: {key} = {value!r} is not supported; the keys are size, {keys}")
        for key in ("mean", "std"):
            if key in given:
                given[key] = _triple(given[key], where, key, above=0 if key == "std" else None)
        _one_of(given.pop("mode", "RGB"), ("RGB",), where, "mode")
        for key, choice in (("interpolation", tuple(INTERPOLATIONS)), ("resize_mode", RESIZE_MODES)):
            _one_of(given.get(key, choice[0]), choice, where, key)
        fill = given.get("fill_color", 0)
        if type(fill) is not int or not 0 <= fill <= 255:
            raise ArtefactError(f"{where}: fill_color = {fill!r}; it must be a whole number from 0 to 255")
        return cls(**given)

    def to_dict(self, size: int) -> dict[str, Any]:
        """The same as open_clip's `preprocess_cfg`, for a model of `size` pixels."""
        filled = {"fill_color": self.fill_color} if self.fill_color else {}
        return {
            "size": size,
            "mode": "RGB",
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
            **filled,
        }

    @classmethod
    def of_hugging_face(cls, values: Mapping[str, Any], size: int, where: str) -> Preprocess:
        """Read the config of transformers' CLIPImageProcessor for a model of `size` pixels.

        Raises ArtefactError, which begins with `where`, for another class, and for what open_clip has no words for.
        """
        found = values.get("image_processor_type") or values.get("feature_extractor_type") or _HF_TYPE
        right = [_HF_TYPE, f"{_HF_TYPE}Fast", f"{_HF_TYPE}Pil", "CLIPFeatureExtractor"]
        _one_of(found, right, where, "image_processor_type")
        for key, fixed in _HF_FIXED.items():
            value = values.get(key, fixed[0])
            if not any(value == wanted or _near(value, wanted) for wanted in fixed):
                raise ArtefactError(f"{where}: {key} = {value!r} is not supported; it must be {fixed[0]!r}")
        kernels = {number: name for name, number in INTERPOLATIONS.items()}
        kernel = values.get("resample", INTERPOLATIONS["bicubic"])
        _one_of(kernel, list(kernels), where, "resample")
        square = {"height": size, "width": size}
        target, crop = values.get("size", size), values.get("crop_size", size)
        cuts = values.get("do_center_crop", True)
        if target in (size, {"shortest_edge": size}) and cuts and crop in (size, square):
            mode = "shortest"
        elif target in (square, [size, size]) and (not cuts or crop in (size, square)):
            mode = "squash"
        else:
            raise ArtefactError(
                f"{where}: size = {target}, crop_size = {crop}, do_center_crop = {cuts} is not supported; both "
                f"sizes must be {size}, that of the model's images, with do_center_crop where size is a shortest edge"
            )
        colours: dict[str, Any] = {
            key: _triple(values[f"image_{key}"], where, f"image_{key}", above=0 if key == "std" else None)
            for key in ("mean", "std")
            if values.get(f"image_{key}") is not None
        }
        return cls(**colours, interpolation=kernels[kernel], resize_mode=mode)

    def to_hugging_face(self, size: int) -> dict[str, Any] | None:
        """The same as a config of CLIPImageProcessor; None for `longest`, which that class cannot do."""
        if self.resize_mode == "longest":
            return None
        cuts, square = self.resize_mode == "shortest", {"height": size, "width": size}
        return {
            "image_processor_type": _HF_TYPE,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size} if cuts else square,
            "resample": INTERPOLATIONS[self.interpolation],
            "do_center_crop": cuts,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [float(value) for value in self.mean],
            "image_std": [float(value) for value in self.std],
        }

    def differs(self, other: Preprocess) -> dict[str, tuple[Any, Any]]:
        """Each setting that differs, with both values. Colours are compared to four decimals."""
        both = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return {name: pair for name, pair in both.items() if _rounded(pair[0]) != _rounded(pair[1])}


AS_OPENAI = Preprocess()
"""What OpenAI's CLIP expects, and open_clip where a config says nothing."""


def _rounded(value: Any) -> Any:
    return [round(one, 4) for one in value] if isinstance(value, tuple) else value


def _near(value: Any, wanted: Any) -> bool:
    number = isinstance(value, float) and isinstance(wanted, float)
    return number and math.isclose(value, wanted, rel_tol=1e-6)


def _one_of(value: Any, right: Any, where: str, key: str) -> None:
    if value not in right:
        raise ArtefactError(
            f"{where}: {key} = {value!r} is not supported; it must be {' or '.join(str(one) for one in right)}"
        )


def _triple(value: Any, where: str, key: str, above: float | None) -> tuple[float, ...]:
    """Three numbers; one number is used for all three, as in open_clip."""
    numbers = [value] * 3 if isinstance(value, int | float) else value
    right = isinstance(numbers, list | tuple) and len(numbers) == 3
    if right:
        right = all(type(one) in (int, float) and abs(one) <= sys.float_info.max for one in numbers)
    if not right or (above is not None and min(numbers) <= above):
        more = f" above {above:g}" if above is not None else ""
        raise ArtefactError(f"{where}: {key} = {value!r}; it must be three numbers{more}, of red, green and blue")
    return tuple(float(one) for one in numbers)
