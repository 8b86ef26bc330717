"""The losses by tiles, run by Triton's interpreter, against plain loops in double precision.

The interpreter replaces parts of Triton where it is imported. So this file is also a program: a rank that computes all
cases and saves what it finds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compt.errors import ConfigError
from compt.recipe.engine import EngineConfig
from compt.recipe.optimizer import Optimizer
from compt.train.losses import contrastive_loss, loss_of, siglip_loss
from tests.helpers.optional import optional
from tests.helpers.ports import free_port
from tests.unit.train.test_losses import oracle, pairs_oracle

KINDS = ("slot", "all", "sigmoid")
CASES = [
    ("slot", 18, 1, 20, "float32", 512),
    *((kind, 18, 4, 20, "bfloat16", 512) for kind in ("slot", "sigmoid")),
    # Few programs: each takes several tiles of columns. One rank alone computes these.
    *((kind, 18, 3, 33, "float32", 1) for kind in KINDS),
]
"""Kind, images, captions an image, width, type of the features, most programs. Tiles are 16 x 16 x 16."""
ALONE = CASES[3:]


def inputs(kind: str, n: int, m: int, d: int, dtype: str, _: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n + m)
    image, text = torch.randn(n, d, generator=generator), torch.randn(n, m, d, generator=generator)
    scalars = [torch.tensor([9.0]), *([torch.tensor([-3.0])] if kind == "sigmoid" else [])]
    return [image.to(getattr(torch, dtype)), text.to(getattr(torch, dtype)), *scalars]


def loss(kind: str, values: list[Tensor], chunk: Any, gather: bool) -> tuple[Tensor, Tensor]:
    """The value, and all terms that have no gradient here."""
    if kind == "sigmoid":
        value, share = siglip_loss(*values, chunk=chunk, gather=gather)
        return value, torch.stack((value, share)).detach()
    terms = contrastive_loss(*values, image_to_text=kind, chunk=chunk, gather=gather)  # type: ignore[arg-type]
    # Not the mean of the directions: that would hide one's gradient in the other's.
    return 0.7 * terms.text_to_image + 0.3 * terms.image_to_text, torch.stack(terms).detach()


def compute(cases: list[tuple[Any, ...]], own: slice, gather: bool) -> list[tuple[Tensor, list[Tensor]]]:
    from compt.train import tiled

    tiled._TILE.update(ROWS=16, COLUMNS=16, DEPTH=16)
    found = []
    for case in cases:
        tiled._PROGRAMS = case[-1]  # type: ignore[misc]
        values = inputs(*case)
        values = [value.detach()[own if at < 2 else slice(None)].requires_grad_() for at, value in enumerate(values)]
        value, terms = loss(case[0], values, "tiled", gather)
        found.append((terms, list(torch.autograd.grad(value, values))))
    return found


def validated(case: tuple[Any, ...]) -> tuple[Tensor, list[bool]]:
    """The terms without gradients, and for each kernel of pairs whether it was to compute some."""
    from compt.train import tiled

    original, asked = tiled._gradient, []

    def gradient(*arguments: Any, wanted: bool = True, **options: Any) -> Any:
        asked.append(wanted)
        return original(*arguments, wanted=wanted, **options)

    tiled._gradient = gradient
    with torch.no_grad():
        terms = loss(case[0], inputs(*case), "tiled", False)[1]
    tiled._gradient = original
    return terms, asked


def main(out: str) -> None:
    """Save what this rank finds, alone and with the other rank."""
    from compt.dist import collectives as dist

    dist.init("cpu", timeout_seconds=120)
    share = 18 // dist.world_size()
    own = slice(dist.rank() * share, (dist.rank() + 1) * share)
    together = compute(CASES, own, True)
    alone = compute(ALONE, slice(None), False) if dist.rank() == 0 else []
    without = validated(ALONE[-1]) if dist.rank() == 0 else ()
    torch.save({"alone": alone, "together": together, "without": without}, f"{out}/{dist.rank()}.pt")
    dist.shutdown()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks find."""
    optional("triton", "tiled")
    out = tmp_path_factory.mktemp("tiled")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.unit.train.test_tiled", str(out)]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(2)]


def right(case: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
    """Terms and gradients of the loops, over the whole batch."""
    values = [value.double().requires_grad_() for value in inputs(*case)]
    if case[0] == "sigmoid":
        terms = pairs_oracle(*values)
        value = terms[0]
    else:
        terms = oracle(*values, case[0])  # type: ignore[assignment]
        value = 0.7 * terms[1] + 0.3 * terms[2]
    gradients = torch.autograd.grad(value.sum(), values)
    return torch.stack([term.reshape(()) for term in terms]).detach(), list(gradients)


def close(found: Tensor, expected: Tensor, dtype: str) -> None:
    rough = dtype == "bfloat16" and found.dtype == torch.bfloat16  # gradients are rounded to the type of the features
    off = (found.double() - expected).norm() / expected.norm()
    assert off < (5e-3 if rough else 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("at", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_tiles_equal_the_loops(found: list[dict[str, Any]], at: int) -> None:
    case = CASES[at]
    terms, gradients = right(case)
    dtype = case[4]
    if case in ALONE:
        alone, of_alone = found[0]["alone"][ALONE.index(case)]
        close(alone, terms, dtype)
        for mine, expected in zip(of_alone, gradients, strict=True):
            close(mine, expected, dtype)
    # On two ranks the loss is the mean of theirs. A rank's features have the gradient of the sum.
    (first, of_first), (second, of_second) = (rank["together"][at] for rank in found)
    close((first + second) / 2, terms, dtype)
    for number, expected in enumerate(gradients):
        both = (of_first[number], of_second[number])
        close((torch.cat(both) if number < 2 else sum(both)) / 2, expected, dtype)  # type: ignore[operator]


@pytest.mark.slow
def test_pairs_without_gradients_are_multiplied_once(found: list[dict[str, Any]]) -> None:
    terms, asked = found[0]["without"]
    close(terms, right(ALONE[-1])[0], "float32")
    assert asked == [False]


def test_a_cpu_takes_chunks_and_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = EngineConfig(loss_chunk="tiled")
    assert asked.on("cuda") == asked
    assert asked.on("cpu").loss_chunk == 64
    monkeypatch.setattr("compt.train.losses.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="loss_chunk: tiled needs Triton"):
        loss_of(Optimizer(), asked)


@pytest.mark.parametrize(
    ("name", "sigmoid", "images", "gradient", "capability"),
    [
        ("_softmax_kernel", False, True, True, 80),
        ("_gradient_kernel", False, True, True, 80),
        ("_gradient_kernel", False, False, True, 90),
        ("_gradient_kernel", True, True, True, 90),
        ("_gradient_kernel", True, True, False, 80),
        ("_gradient_kernel", True, False, True, 80),
    ],
)
def test_the_kernels_compile_for_gpus_that_are_not_here(
    name: str,
    sigmoid: bool,
    images: bool,
    gradient: bool,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton's compiler takes them, their products run on tensor cores, and their tiles fit into shared memory."""
    optional("triton", "tiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from compt.train import tiled

    constants = {"WIDTH": 512, "SPAN": 1024, "GROUPS": 4, "PER_ROW": 1, "PER_COLUMN": 4, **tiled._TILE}
    more = {"SIGMOID": sigmoid, "IMAGES": images, "CAPTIONS": 4, "RIGHT": 1, "GRADIENT": gradient}
    kernel = getattr(tiled, name)
    names = kernel.arg_names
    given = {key: value for key, value in {**constants, **more}.items() if key in names}
    types = {key: "i32" if key in ("n_rows", "n_columns", "first") else "*fp32" for key in names}
    source = ASTSource(
        kernel,
        types | dict.fromkeys(given, "constexpr"),
        {(names.index(key),): value for key, value in given.items()},
        # What a launch knows of torch's pointers. Loads become wide and asynchronous, and take shared memory.
        {
            (at,): [["tt.divisibility", 16]]
            for at, key in enumerate(names)
            if types[key] == "*fp32" and key not in given
        },
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": tiled._WARPS})
    assert made.metadata.shared < 100 * 1024
    assert "mma" in made.asm["ptx"]
    assert "tf32" in made.asm["ptx"]
    products = made.asm["ttgir"].count("tt.dot") + made.asm["ttgir"].count("warp_group_dot ")
    # Of three products in TF32 each: the similarities, and their gradient.
    assert products == (6 if name == "_gradient_kernel" and gradient else 3)


if __name__ == "__main__":
    main(sys.argv[1])
