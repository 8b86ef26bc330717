"""How long compt's own training step takes on a GPU: a roofline of its launches, bytes and FLOPs.

    host     = launches * LAUNCH_SECONDS
    products = max(FLOPs / (peak * PRODUCT_SHARE), bytes of matrix products / (bandwidth * BANDWIDTH_SHARE))
    traffic  = bytes of everything else / (bandwidth * BANDWIDTH_SHARE)
    seconds  = max(host, products + traffic)

Kernels run one after another on the device, while the host launches the next ones. Launches and bytes are those that
`compt.bench.launches` counts (a test holds them together), the peaks are of the datasheet. Nothing here was measured:
it is a projection. Left out: loading data, and communication between GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from compt.cost.counts import Tokens, parameters
from compt.cost.gpus import Device
from compt.cost.speed import Conditions, channels, mean_tokens
from compt.cost.training import JobCost
from compt.models.presets import PACKED, ModelSpec

LAUNCH_SECONDS = 10e-6
"""Work of the host for one operation of eager PyTorch: Python, autograd, dispatch and cudaLaunchKernel. An
assumption until a GPU has run `check/launches` of the suite."""
PRODUCT_SHARE = 0.7
"""Share of the dense peak that matrix products reach. An assumption; narrow models reach less than wide ones."""
BANDWIDTH_SHARE = 0.85
"""Share of the datasheet's bandwidth that copies reach. An assumption."""


@dataclass(frozen=True)
class _PerBlock:
    """Operations of a step: `base` of no block, and those of a block of each tower."""

    base: float
    image: float
    text: float

    def of(self, spec: ModelSpec, scale: float) -> float:
        """Of a model; `scale` is for the blocks of its image tower."""
        return self.base + self.image * spec.depth * scale + self.text * spec.text_depth


# Counted: forward and backward pass of a student, and the forward pass of a teacher in bf16. Text in n buckets repeats
# what a block of the text tower launches, but not the casts of its weights.
_PACKED = (_PerBlock(37, 15, 13), _PerBlock(107, 25, 24), _PerBlock(25, 10, 10))
_COMPILED_BLOCKS = (_PerBlock(37, 8, 8), _PerBlock(107, 20, 20), _PerBlock(25, 8, 8))
"""Of compiled blocks, estimated, not counted: products and attention stay, the rest of a block is three kernels
forward and seven backward."""
_COMPILED_TRAFFIC = 0.6
"""What a compiled block moves beside products, of what it moves eagerly: estimated. Casts, sums and norms are fused."""
_OTHERS = 44
"""Operations of input, loss and optimizer: about as many as a captured step launches beside its graph."""
_DISTILLED = 68
"""Operations that distillation adds to loss and backward pass."""
_SWIN_LAUNCHES = {"forward": 2.5, "backward": 1.88, "teacher": 2.43}
"""Operations of a block of a Swin over those of a ViT's: windows are cut, shifted and padded; stages are merged."""
_SWIN_BYTES = {"products": 1.22, "rest": 2.1}

# Bytes for each channel of each position that passes a block, in bf16: forward, backward, teacher.
_PRODUCTS = (40.0, 80.0, 40.0)
_REST = (64.0, 126.0, 36.0)
_PARAMETER_BYTES = {"products": 6.0, "rest": 12.0, "optimizer": 32.0}
"""Bytes for each parameter in a step: read by products; copied to bf16, and gradients back; clipping and AdamW."""


@dataclass(frozen=True)
class StepTime:
    """What a step of one GPU takes: `launches`, and seconds of the host, of matrix products and of other traffic.

    Products take the longer of `computing`, for their FLOPs, and `moving`, for their bytes.
    """

    launches: int
    host: float
    computing: float
    moving: float
    traffic: float

    @property
    def products(self) -> float:
        """Seconds of matrix products."""
        return max(self.computing, self.moving)

    @property
    def device(self) -> float:
        """Seconds in which the GPU computes: those of a step whose launches cost nothing, as in a CUDA graph."""
        return self.products + self.traffic

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return max(self.host, self.device)

    @property
    def decides(self) -> str:
        """What the step waits for: launches by the host, or else the longer part of what the GPU computes."""
        if self.host > self.device:
            return "launches"
        return "products" if self.products > self.traffic else "traffic"

    @property
    def low(self) -> float:
        """The least: the full peak and bandwidth of the datasheet, and launches that cost nothing."""
        return max(self.computing * PRODUCT_SHARE, self.moving * BANDWIDTH_SHARE) + self.traffic * BANDWIDTH_SHARE

    @property
    def high(self) -> float:
        """The most: the host launches nothing while the GPU computes."""
        return self.host + self.device


def launches(student: ModelSpec, teacher: ModelSpec | None, conditions: Conditions) -> int:
    """Operations that a step launches, in half precision."""
    if conditions.settings.get("engine.graphs") == "on":
        return _OTHERS + 1
    forward, backward, known = _counted(conditions)
    pieces = -(-conditions.batch // (conditions.micro_batch or conditions.batch))
    again = (pieces > 1) + conditions.recompute
    scale = _SWIN_LAUNCHES if student.arch == "swin" else dict.fromkeys(_SWIN_LAUNCHES, 1.0)
    whole = (1 + again) * forward.of(student, scale["forward"]) + backward.of(student, scale["backward"])
    if teacher is not None:
        whole += known.of(teacher, _SWIN_LAUNCHES["teacher"] if teacher.arch == "swin" else 1.0) + _DISTILLED
    return round(pieces * whole + _OTHERS)


def _counted(conditions: Conditions) -> tuple[_PerBlock, _PerBlock, _PerBlock]:
    n = conditions.text_buckets
    if conditions.compile != "off":
        n = max(1, n)
        forward, backward, known = (_PerBlock(one.base, one.image, one.text * n) for one in _COMPILED_BLOCKS)
        return forward, backward, known
    if n == PACKED:
        return _PACKED
    return (
        _PerBlock(20 + 21 * n, 15, 8 + 12 * n),
        _PerBlock(76 + 32 * n, 25, 36 * n - 4),
        _PerBlock(11 + 15.5 * n, 10, 10 * n),
    )


def step_time(
    student: ModelSpec, teacher: ModelSpec | None, cost: JobCost, device: Device, conditions: Conditions
) -> StepTime:
    """The projected time of a step of one `device`, whose share of the batch is `conditions.batch`.

    `cost` is that of the job in `exact` mode. In half precision: nothing was counted in fp32.
    """
    captions, tokens, batch = conditions.captions, conditions.tokens, conditions.batch
    again = cost.recompute_macs / cost.student_forward_macs
    moved = {"products": 0.0, "rest": 0.0}
    for part, each in (("products", _PRODUCTS), ("rest", _REST)):
        fused = _COMPILED_TRAFFIC if conditions.compile != "off" and part == "rest" else 1.0
        passes = each[0] * (1 + again) + each[1]
        models = [(student, passes), *([(teacher, each[2])] if teacher else [])]
        moved[part] = sum(fused * many * batch * _passed(spec, captions, part, tokens) for spec, many in models)
    weights = parameters(student)
    embedded = student.vocab_size * student.text_width
    moved["products"] += _PARAMETER_BYTES["products"] * (weights - embedded)
    moved["rest"] += _PARAMETER_BYTES["rest"] * (weights - embedded) + _PARAMETER_BYTES["optimizer"] * weights
    bandwidth = device.bandwidth_bytes * BANDWIDTH_SHARE
    count = launches(student, teacher, conditions)
    flops = 2 * cost.sample_macs * batch
    return StepTime(
        launches=count,
        host=count * LAUNCH_SECONDS,
        computing=flops / (device.peak_flops[conditions.precision] * PRODUCT_SHARE),
        moving=moved["products"] / bandwidth,
        traffic=moved["rest"] / bandwidth,
    )


def _passed(spec: ModelSpec, captions: int, part: str, tokens: Tokens) -> float:
    """Channels of all positions that pass the blocks; those of a Swin as if they moved as many bytes as a ViT's."""
    whole = channels(spec, captions, tokens)
    if spec.arch != "swin":
        return whole
    text = captions * mean_tokens(spec, tokens) * spec.text_width * spec.text_depth
    return (whole - text) * _SWIN_BYTES[part] + text
