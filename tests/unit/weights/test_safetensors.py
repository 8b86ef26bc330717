"""safetensors files, a tensor at a time: the library reads what we write, and we read what it writes."""

import errno
import gc
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compt.errors import ArtefactError, RunError
from compt.weights import safetensors as weight_file
from compt.weights.safetensors import DTYPES, LazyState, TensorFile, share_out, split_files, write_tensors

METADATA = {"format": "pt"}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def drawn(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: (100 * torch.randn(shape, generator=draw)).to(dtype) for name, shape in shapes.items()}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def body(path: Path) -> tuple[dict[str, object], bytes]:
    """The header and the tensors' bytes, taken apart by the format's description."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_file_holds_what_the_library_would_write(tmp_path: Path, dtype: torch.dtype) -> None:
    state = drawn({"b.weight": (4, 6), "c": (8,), "a.größe": (2, 2, 2)}, dtype)
    in_order = dict(sorted(state.items()))
    size = write_tensors(tmp_path / "ours", in_order, shapes_of(in_order), METADATA)
    save_file(state, tmp_path / "theirs", metadata=METADATA)
    assert body(tmp_path / "ours") == body(tmp_path / "theirs")
    assert size == len(body(tmp_path / "ours")[1])
    assert_same(load_file(tmp_path / "ours"), state)
    for name in ("ours", "theirs"):
        assert_same(LazyState(tmp_path, [name]), state)


def test_tensors_of_several_types_and_odd_sizes_stay_aligned(tmp_path: Path) -> None:
    types = [torch.float16, torch.float64, torch.uint8, torch.float32, torch.bfloat16]
    state = {
        f"{number}.{size}": torch.arange(size).to(types[number % len(types)]).reshape(shape)
        for number, (size, shape) in enumerate(
            [(1, ()), (3, (3,)), (8, (2, 4)), (507, (169, 3)), (9, (3, 3)), (0, (0, 4))] * 3
        )
    }
    write_tensors(tmp_path / "file", state, shapes_of(state), METADATA)
    assert_same(load_file(tmp_path / "file"), state)
    assert_same(LazyState(tmp_path, ["file"]), state)
    header = body(tmp_path / "file")[0]
    assert all(header[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in state.items())


def test_the_header_has_room_for_whatever_the_types_turn_out_to_be(tmp_path: Path) -> None:
    shapes = {f"some.layer.{number}.weight": (number + 1, 10 ** (number % 4)) for number in range(30)}
    lengths = set()
    for dtype in (torch.float8_e4m3fn, torch.float64, torch.uint8):
        write_tensors(tmp_path / "file", drawn(shapes, dtype), shapes, METADATA)
        content = (tmp_path / "file").read_bytes()
        lengths.add(int.from_bytes(content[:8], "little"))
        assert load_file(tmp_path / "file").keys() == shapes.keys()
    assert len(lengths) == 1


def test_views_and_gradients(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    state = {"transposed": whole.T, "part": whole[1:3, ::2], "trained": torch.nn.Parameter(whole.clone())}
    write_tensors(tmp_path / "file", state, shapes_of(state), METADATA)
    assert_same(load_file(tmp_path / "file"), {name: tensor.detach().contiguous() for name, tensor in state.items()})


class Watched(Mapping[str, Tensor]):
    """Makes tensors when asked, and counts the bytes of those that are alive."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes, self.alive, self.most, self.asked = shapes, 0, 0, list[str]()

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.full(self.shapes[name], float(len(name)))
        self.asked.append(name)
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor.untyped_storage(), self._gone, tensor.nbytes)
        return tensor

    def _gone(self, size: int) -> None:
        self.alive -= size

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def test_no_more_than_one_tensor_is_alive(tmp_path: Path) -> None:
    gc.disable()  # nothing may wait for the collector
    try:
        state = Watched({f"layer.{number}": (16, 8 * (1 + number % 5)) for number in range(40)})
        write_tensors(tmp_path / "file", state, state.shapes, METADATA)
    finally:
        gc.enable()
    assert state.most == 4 * 16 * 8 * 5
    assert state.asked == list(state.shapes)


def test_a_read_tensor_is_nobody_elses(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8)}, tmp_path / "file")
    state = LazyState(tmp_path, ["file"])
    state["a"].fill_(7)
    assert torch.equal(state["a"], torch.zeros(8))
    assert not load_file(tmp_path / "file")["a"].any()


def test_reading_goes_on_past_two_gigabytes_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.arange(100.0)}, tmp_path / "file")
    whole = os.preadv
    monkeypatch.setattr("compt.weights.safetensors.os.preadv", lambda file, into, at: whole(file, [into[0][:13]], at))
    assert torch.equal(LazyState(tmp_path, ["file"])["a"], torch.arange(100.0))


def test_what_is_not_a_file_of_tensors_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100.0)}, tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,%d]}}'
    bad = {
        "nothing": b"",
        "short": good[:-1],
        "long": good + b"x",
        "no header": b"\0" * 200,
        "huge header": b"\xff" * 7 + b"\x7f" + good[8:],
        "not json": (8).to_bytes(8, "little") + b"{'a': 1}",
        "other size": (len(header % 4)).to_bytes(8, "little") + header % 4 + b"\0" * 4,
        "outside": (len(header % 8)).to_bytes(8, "little") + header % 8 + b"\0" * 4,
        "missing": None,
    }
    for name, content in bad.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtefactError, match=f"{name}: not a readable safetensors file"):
            TensorFile(tmp_path / name)
    with pytest.raises(ArtefactError, match="a is in good and in twin"):
        (tmp_path / "twin").write_bytes(good)
        LazyState(tmp_path, ["good", "twin"])


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100.0)}, tmp_path / "file")
    state = LazyState(tmp_path, ["file"])
    os.truncate(tmp_path / "file", 200)
    with pytest.raises(ArtefactError, match="file: ends early"):
        state["a"]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for state, shapes, message in (
        ({"a": torch.zeros(2, 3)}, {"a": (3, 2)}, r"a is \[2, 3\] where the model has \[3, 2\]"),
        ({"a": torch.zeros(8, dtype=torch.complex64)}, {"a": (8,)}, "a is torch.complex64; a safetensors file has no"),
    ):
        with pytest.raises(ArtefactError, match=message):
            write_tensors(tmp_path / "file", state, shapes, METADATA)
    with pytest.raises(RunError, match="cannot write .*Is a directory"):
        write_tensors(tmp_path, {}, {}, METADATA)


def test_a_full_disk_and_one_that_fails_at_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.zeros(1 << 20)}
    if Path("/dev/full").exists():
        with pytest.raises(RunError, match="cannot write /dev/full: No space left on device"):
            write_tensors(Path("/dev/full"), state, shapes_of(state), METADATA)

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("compt.weights.safetensors.os.fsync", broken)
    with pytest.raises(RunError, match="cannot write .*file: Input/output error"):
        write_tensors(tmp_path / "file", state, shapes_of(state), METADATA)


def test_a_file_that_was_not_finished_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = drawn({"a": (80,), "b": (80,)}, torch.float32)
    append = weight_file._append

    def killed(file, path, name, *rest):
        if name == "b":
            file.flush()
            raise KeyboardInterrupt
        return append(file, path, name, *rest)

    monkeypatch.setattr(weight_file, "_append", killed)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "file", state, shapes_of(state), METADATA)
    assert (tmp_path / "file").stat().st_size > 320
    with pytest.raises(ArtefactError, match="not a readable safetensors file"):
        TensorFile(tmp_path / "file")


def test_parameters_go_to_files_by_names_and_shapes_alone() -> None:
    shapes = {"a": (10,), "b": (10,), "c": (50,), "d": (), "e": (19,)}
    assert split_files(shapes, 80) == [["a", "b"], ["c"], ["d", "e"]]
    assert split_files(shapes, 10**9) == [list(shapes)]
    assert split_files(shapes, 1) == [[name] for name in shapes]


@pytest.mark.parametrize("writers", [1, 2, 3, 8])
def test_writers_get_about_the_same(writers: int) -> None:
    sizes = [7, 7, 7, 7, 1, 30, 2, 2, 9, 9]
    owners = share_out(sizes, writers)
    assert set(owners) <= set(range(writers))
    loads = [
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == writer) for writer in range(writers)
    ]
    # The bound of Graham's rule, largest first: 4/3 of the best there could be.
    assert max(loads) <= 4 / 3 * max(*sizes, math.ceil(sum(sizes) / writers))
    assert owners == share_out(list(sizes), writers)
