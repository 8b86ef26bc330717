"""Hostile files of every kind: each is refused, and its code does not run. Each payload works where it is
loaded without care, or the test would show nothing.
"""

from __future__ import annotations

import builtins
import copy
import io
import os
import pickle
import resource
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, ChunkStorageMetadata, Metadata

from compt.errors import ArtefactError
from compt.weights.open import open_model
from compt.weights.pickles import Inert, load_dcp_metadata, load_torch_file, tensors_in
from tests.unit.weights.written import SPEC, STEPS, load_deepspeed

TAG = f"global_step{STEPS}"


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def payloads(mark: Path) -> dict[str, Any]:
    """Each leaves the file `mark` when it runs."""
    code = f"open({str(mark)!r}, 'w').close()"
    return {
        "system": Calls(os.system, f"touch {mark}"),
        "eval": Calls(builtins.eval, code),
        "exec": Calls(builtins.exec, code),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "makedirs": Calls(os.makedirs, str(mark)),
        "copyfile": Calls(shutil.copyfile, __file__, str(mark)),
    }


LOUD = ["system", "eval", "exec", "makedirs", "copyfile"]


@pytest.mark.parametrize("name", LOUD)
def test_the_payloads_work(tmp_path, name):
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(payloads(mark)[name]))
    assert mark.exists()


@pytest.fixture(params=[*LOUD, "getattr"])
def payload(request, tmp_path):
    mark = tmp_path / "mark"
    yield payloads(mark)[request.param]
    assert not mark.exists(), "the payload has run"


def hostile(payload: Any) -> dict[str, Any]:
    return {"epoch": 1, "state_dict": {"module.visual.proj": torch.ones(2), "module.token_embedding.weight": payload}}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_files_of_torch_save(tmp_path, payload, suffix, zipped):
    path = tmp_path / f"model{suffix}"
    torch.save(hostile(payload), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtefactError, match="refused: it asks for"):
        open_model(path, SPEC)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles(tmp_path, payload, protocol):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(hostile(payload), protocol=protocol))
    with pytest.raises(ArtefactError, match="refused|not a file that torch.save wrote"):
        open_model(path, SPEC)


def test_in_a_metadata(tmp_path, payload):
    for content in (payload, Metadata({"a": payload}), Metadata({}, storage_data=payload, planner_data=[payload])):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(ArtefactError, match="refused: it asks for"):
            open_model(tmp_path, SPEC)


def test_the_metadata_of_a_rank_alone_is_not_looked_at(dcps, tmp_path, payload):
    shutil.copytree(dcps / "alone", tmp_path / "copy")
    (tmp_path / "copy" / "__0.metadata").write_bytes(pickle.dumps(payload))
    assert len(open_model(tmp_path / "copy", SPEC).state) == 50


def sliced(dcps: Path, folder: Path, content: bytes) -> Path:
    """A distributed checkpoint in which `content` stands for a tensor. Such bytes are a file of torch.save."""
    shutil.copytree(dcps / "alone", folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        if index.fqn == "student.model.visual.proj":
            place.relative_path, place.offset, place.length = "bad.distcp", 5, len(content)
    (folder / "bad.distcp").write_bytes(bytes(5) + content + bytes(7))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_in_the_tensors_of_a_distributed_checkpoint(dcps, tmp_path, payload):
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    state = open_model(sliced(dcps, tmp_path / "copy", buffer.getvalue()), SPEC).state
    with pytest.raises(ArtefactError, match=r"cannot read student.model.visual.proj: refused: it asks for"):
        state["visual.proj"]


@pytest.mark.parametrize("name", ["zero1", "zero3"])
@pytest.mark.parametrize("kind", ["optim", "model"])
def test_in_the_files_of_deepspeed(zeros, tmp_path, payload, name, kind):
    shutil.copytree(zeros / name, tmp_path / name)
    path = sorted((tmp_path / name / TAG).glob(f"*{kind}_states.pt"))[-1]
    values = load_deepspeed(path)
    values["optimizer_state_dict" if kind == "optim" else "module"]["more"] = payload
    torch.save(values, path)
    with pytest.raises(ArtefactError, match="refused: it asks for"):
        open_model(tmp_path / name, SPEC)


def test_scripts_in_the_folder_are_not_run(zeros, tmp_path):
    shutil.copytree(zeros / "zero2", tmp_path / "copy")
    for name in ("zero_to_fp32.py", "setup.py", "deepspeed.py", "sitecustomize.py"):
        (tmp_path / "copy" / name).write_text(f"open({str(tmp_path / 'mark')!r}, 'w')")
    assert len(open_model(tmp_path / "copy", SPEC).state) == 50
    assert not (tmp_path / "mark").exists()


def test_a_class_that_pretends_to_be_of_deepspeed_is_never_imported(tmp_path, monkeypatch):
    """Any name below `deepspeed.` is replaced by something inert, whatever the arguments."""
    (tmp_path / "deepspeed").mkdir()
    mark = tmp_path / "mark"
    (tmp_path / "deepspeed" / "__init__.py").write_text("")
    (tmp_path / "deepspeed" / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef run(*a): pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02cdeepspeed.evil\nrun\nX\x02\x00\x00\x00hiq\x00\x85R.")
        archive.writestr("model/version", "3\n")
        archive.writestr("model/byteorder", "little")
    found = load_torch_file(path)
    assert isinstance(found, Inert)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "model/../../evil", "model\\..\\evil", "model/data/.."])
def test_archives_that_lead_out_of_themselves(tmp_path, name):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ArtefactError, match="leads out of the archive"):
        open_model(path, SPEC)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_way_round(tmp_path):
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ArtefactError, match=r"TorchScript archive.*torch\.jit\.load"):
        open_model(path, SPEC)


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + b"0" * 40, b"\x80\x02}q\x00.", b"\x80\x02.", b"\x80"])
def test_garbage(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"model\.pt: (not|refused|no CLIP model)"):
        open_model(path, SPEC)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"metadata: not the metadata"):
        load_dcp_metadata(tmp_path / ".metadata")


def test_archives_of_the_oldest_torch(tmp_path):
    path = tmp_path / "model.pt"
    with tarfile.open(path, "w") as archive:
        for name in ("pickle", "storages", "tensors", "sys_info"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("../mark"))
    with pytest.raises(ArtefactError, match=r"model\.pt: not a file that torch.save wrote"):
        open_model(path, SPEC)
    assert not (tmp_path.parent / "mark").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_dicts_without_end(tmp_path, zipped):
    endless: dict[str, Any] = {"a": torch.ones(1)}
    endless["b"] = endless
    torch.save(endless, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ArtefactError, match="dicts in dicts"):
        open_model(tmp_path / "model.pt", SPEC)


def test_torn_files(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2000)}, path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 997):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match=r"model\.pt"):
            open_model(path, SPEC)


def test_what_is_let_through(tmp_path):
    """Numbers, strings, lists, tensors and parameters, in the old format and the new one."""
    import argparse

    import numpy as np

    values = {
        "epoch": 3,
        "args": argparse.Namespace(lr=1.0),
        "best": np.float64(0.5),
        "state_dict": {"w": torch.arange(4.0), "p": torch.nn.Parameter(torch.ones(2, 3).T)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"t": torch.ones(1)}]},
    }
    for zipped in (True, False):
        path = tmp_path / "model.pt"
        if not zipped:
            values.pop("args"), values.pop("best")
        torch.save(values, path, _use_new_zipfile_serialization=zipped)
        found = dict(tensors_in(load_torch_file(path)))
        assert set(found) == {"state_dict.w", "state_dict.p"}
        assert torch.equal(found["state_dict.w"], torch.arange(4.0))
        assert type(found["state_dict.p"]) is torch.Tensor


def test_tensors_that_are_not_plain_are_refused(tmp_path):
    for tensor in (torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        path = tmp_path / "model.pt"
        torch.save({"a": {"b": tensor}}, path)
        with pytest.raises(ArtefactError, match=r"a\.b: a Tensor|not a plain"):
            open_model(path, SPEC)


CHUNKS = b"ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\n"
SIZE = b"X\x08\0\0\0__init__ctorch\nSize\ns"
ENUM = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"


@pytest.mark.parametrize(
    "target", [CHUNKS, b"cargparse\nNamespace\n", ENUM, ENUM + b"K\0\x85R", b"ctorch.serialization\n_get_layout\n"]
)
@pytest.mark.parametrize("state", [b"N}" + SIZE + b"\x86", b"}" + SIZE])
def test_a_refused_metadata_changes_no_class(tmp_path, target, state):
    layout = vars(torch.serialization._get_layout)
    things = (ChunkStorageMetadata, _MEM_FORMAT_ENCODING, _MEM_FORMAT_ENCODING(0), Inert)
    before = [dict(vars(thing)) for thing in things] + [dict(layout)]
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + target + state + b"b.")
    with pytest.raises(ArtefactError, match=r"refused: it changes a class|not the metadata"):
        load_dcp_metadata(tmp_path / ".metadata")
    assert [dict(vars(thing)) for thing in things] + [dict(layout)] == before


def test_a_refused_archive_changes_no_class(tmp_path):
    before = dict(vars(torch.nn.Parameter)), dict(vars(torch.Tensor))
    for name in (b"ctorch.nn.parameter\nParameter\n", b"ctorch\nTensor\n", b"cargparse\nNamespace\n"):
        path = tmp_path / "model.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", b"\x80\x02" + name + b"N}" + SIZE + b"\x86b.")
            archive.writestr("model/version", "3\n")
            archive.writestr("model/byteorder", "little")
        with pytest.raises(ArtefactError) as error:
            load_torch_file(path)
        assert (dict(vars(torch.nn.Parameter)), dict(vars(torch.Tensor))) == before
        assert "weights_only" not in str(error.value)
        assert "trust" not in str(error.value)


def new_peak():
    """Forget the most memory of this process so far, of earlier tests and of what this one prepared; in kB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x80\x02Nr\xff\xff\xff\x07.",  # a memo of 2**27 places
        b"\x80\x02Np2000000000\n.",
        b"\x80\x05\x96" + (1 << 31).to_bytes(8, "little") + b".",  # a bytearray of 2 GiB
        b"\x80\x04\x95" + (1 << 31).to_bytes(8, "little") + b"N.",  # a frame
        b"\x80\x04\x8d" + (1 << 31).to_bytes(8, "little") + b".",  # a string
    ],
)
def test_a_refused_metadata_costs_no_memory(tmp_path, bomb):
    (tmp_path / ".metadata").write_bytes(bomb)
    before = new_peak()
    with pytest.raises(ArtefactError, match="not the metadata"):
        load_dcp_metadata(tmp_path / ".metadata")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def packed(path: Path, numbers: int) -> Path:
    """A file of torch.save with zeros, compressed."""
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(numbers)}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    return path


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path):
    path = packed(tmp_path / "packed.pt", 1000)
    with pytest.raises(ArtefactError, match=r"is compressed, and torch\.save compresses nothing.*zip -0"):
        open_model(path, SPEC)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refusal_passes_on_no_advice_to_load_unsafely(tmp_path, zipped):
    path = tmp_path / "model.pt"
    for value in ({"a": Calls(os.getcwd)}, Calls(os.getcwd), {"a": object()}, {"a": Path("x")}, {"a": len}):
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ArtefactError) as error:
            open_model(path, SPEC)
        for word in ("weights_only", "safe_globals", "trust", "allowlist", "arbitrary"):
            assert word not in str(error.value)
    path.write_bytes(b"\x80\x02K\x01K\x02\x87.")
    with pytest.raises(ArtefactError) as error:
        open_model(path, SPEC)
    assert "weights_only" not in str(error.value)


def call(name: bytes, number: int) -> bytes:
    """A call of `name` with one large number."""
    module, _, function = name.rpartition(b".")
    digits = number.to_bytes(8, "little")
    return b"c" + module + b"\n" + function + b"\n\x8a\x08" + digits + b"\x85R"


def archive_of(path: Path, instructions: bytes) -> Path:
    """A file of torch.save with one storage of 16 bytes, named 0."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + instructions + b".")
        for name, content in {"version": b"3\n", "byteorder": b"little", "data/0": bytes(16)}.items():
            archive.writestr(f"model/{name}", content)
    return path


SIBLINGS = {
    "bytearray": call(b"builtins.bytearray", 1 << 31),
    "bytearray of Python 2": call(b"__builtin__.bytearray", 1 << 31),
    "storage": call(b"torch.FloatStorage", 1 << 31),
    "range": call(b"builtins.range", 1 << 31),
    "frame": b"\x95" + (1 << 40).to_bytes(8, "little") + b"N",
    "string": b"X\xff\xff\xff\x7f",
    "extension": b"\x82\x01",
    "instance": b"(ios\nsystem\n",
    "persistent": b"Pname\n",
    "persistent, not a storage": b"(X\7\0\0\0storageccollections\nOrderedDict\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\4tQ",
    "arguments": b"ctorch._utils\n_rebuild_qtensor\n)R",
    "dict of a class": b"ctorch.nn.parameter\nParameter\n}" + SIZE + b"b",
    "deep": b"(" * 30_000 + b"t" * 30_000 + b"ccopyreg\nname\n",
}


@pytest.mark.parametrize("form", ["archive", "plain", "metadata"])
@pytest.mark.parametrize("name", SIBLINGS)
def test_refused_pickles_of_every_kind_cost_nothing_and_change_nothing(tmp_path, name, form):
    path = tmp_path / "model.pt"
    if form == "archive":
        archive_of(path, SIBLINGS[name])
    else:
        path.write_bytes(b"\x80\x02" + SIBLINGS[name] + b".")
    things = (torch.nn.Parameter, torch.Tensor, torch.Size, Inert, ChunkStorageMetadata, Metadata)
    allowed = dict(torch._weights_only_unpickler._get_allowed_globals())
    before, used = [dict(vars(thing)) for thing in things], new_peak()
    with pytest.raises(ArtefactError, match=r"model\.pt: (refused|not )"):
        (load_dcp_metadata if form == "metadata" else load_torch_file)(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 100_000  # kB
    assert [dict(vars(thing)) for thing in things] == before
    assert torch._weights_only_unpickler._get_allowed_globals() == allowed


def nested(depth: int) -> bytes:
    """The instructions for a pair that holds one pair twice, and so on, `depth` deep."""
    return b"K\0K\0\x86q\0" + b"".join(b"h%c\x86q%c" % (at, at + 1) for at in range(depth))


NESTED = {
    "key": b"}(" + nested(60) + b"K\1u",
    "item": b"}" + nested(60) + b"K\1s",
    "argument": b"ccollections\nOrderedDict\n](" + nested(60) + b"K\1\x86e\x85R",
    "storage": b"(X\7\0\0\0storagectorch\nFloatStorage\n" + nested(60) + b"X\3\0\0\0cpuK\4tQ",
}
INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
FQN = b"X\3\0\0\0fqn"


@pytest.mark.parametrize("form", ["archive", "plain", "metadata"])
@pytest.mark.parametrize("name", NESTED)
def test_a_key_that_would_take_for_ever_to_hash_is_refused(tmp_path, name, form):
    path = tmp_path / "model.pt"
    if form == "archive":
        archive_of(path, NESTED[name])
    elif form == "plain":
        # torch's older files begin with three other pickles.
        start = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
        path.write_bytes(start + b"\x80\x02" + NESTED[name] + b".")
    else:
        path.write_bytes(b"\x80\x02" + NESTED[name] + b".")
    with pytest.raises(ArtefactError, match=r"model\.pt: refused: it (holds tuples|asks for torch.FloatStorage)"):
        (load_dcp_metadata if form == "metadata" else load_torch_file)(path)
    assert torch._weights_only_unpickler.Unpickler.__module__ == "torch._weights_only_unpickler"


@pytest.mark.parametrize("filled", [False, True])
def test_indexes_in_indexes_are_refused(tmp_path, filled):
    """The keys of a `.metadata`, made by a call, or filled after they were put into one another."""
    if filled:
        made = b"".join(INDEX + b")\x81q%c0" % at for at in range(61))
        filling = b"".join(b"h%c}(" % (at + 1) + FQN + b"h%c" % at + b"ub0" for at in reversed(range(60)))
        whole = b"}" + made + filling + b"h<K\1s"
    else:
        made = [INDEX + b"K\0\x85Rq\0"]
        made += [INDEX + b"h%cNh%c\x87Rq%c" % (at, at, at + 1) for at in range(60)]
        whole = b"}" + b"0".join(made) + b"K\1s"
    (tmp_path / ".metadata").write_bytes(b"\x80\x02" + whole + b".")
    with pytest.raises(ArtefactError, match="refused: it holds (indexes in indexes|tuples that hold one another)"):
        load_dcp_metadata(tmp_path / ".metadata")


def with_two_lists(path: Path) -> Path:
    """An archive with compressed files, of which zipfile reads another list than torch."""
    content = packed(path, 1 << 20).read_bytes()
    with zipfile.ZipFile(path) as archive:
        listed, end = content[archive.start_dir : -22], content[-22:]
    path.write_bytes(content[:-22] + listed.replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\0\0") + end)
    return path


def with_shared_bytes(path: Path) -> Path:
    """An archive whose files are the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", bytes(1000))
        first = archive.infolist()[0]
        for number in range(9):
            archive.filelist.append(copy.copy(first))
            archive.filelist[-1].filename = f"model/data/{number}"
        archive._didModify = True
    return path


@pytest.mark.parametrize("forge", [with_two_lists, with_shared_bytes])
def test_archives_that_torch_reads_otherwise_are_refused(tmp_path, forge):
    path = forge(tmp_path / "model.pt")
    with zipfile.ZipFile(path) as archive:
        assert not any(item.compress_type for item in archive.infolist())
    with pytest.raises(ArtefactError, match="or torn .its list of files is another one"):
        load_torch_file(path)


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda path: archive_of(path, SIBLINGS["bytearray"]), "visual.proj: refused: it asks for bytearray"),
        (lambda path: archive_of(path, NESTED["key"]), "visual.proj: refused: it holds tuples"),
        (lambda path: packed(path, 1 << 26), r"bad\.distcp: refused: .* is compressed"),
        (lambda path: path.write_bytes(b"\x80\2K\1K\2\x87.") and path, "visual.proj: not a file that torch.save wrote"),
    ],
)
def test_the_tensors_of_a_distributed_checkpoint_cost_nothing(dcps, tmp_path, forge, message):
    content = forge(tmp_path / "model.pt").read_bytes()
    state = open_model(sliced(dcps, tmp_path / "copy", content), SPEC).state
    used = new_peak()
    with pytest.raises(ArtefactError, match=message) as error:
        state["visual.proj"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 100_000  # kB
    assert "weights_only" not in str(error.value)


def test_large_and_shared_tuples_are_read(tmp_path):
    import random

    betas = (0.9, 0.999)
    pairs = tuple((number, betas) for number in range(20_000))
    values = {"state": random.Random(0).getstate(), "pairs": pairs, "flat": tuple(range(50_000)), betas: 1}
    for zipped in (True, False):
        torch.save(values, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
        assert load_torch_file(tmp_path / "model.pt") == values


def test_dicts_that_hold_one_another_too_often(tmp_path):
    inner: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(19):
        inner = dict.fromkeys("abcdefghij", inner)
    torch.save(inner, tmp_path / "model.pt")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ArtefactError, match="hold one another too often"):
        patch.setattr("compt.weights.pickles._MOST", 10_000)
        open_model(tmp_path / "model.pt", SPEC)


def tensor_of(key: bytes, numbers: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The instructions for {"a": a float32 view of the storage `key`}."""

    def integer(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    def whole(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX" + len(key).to_bytes(4, "little") + key
    storage += b"X\3\0\0\0cpu" + integer(numbers) + b"tQ"
    view = storage + integer(offset) + whole(shape) + whole(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + view + b"tRs"


@pytest.mark.parametrize(
    ("tensor", "right"),
    [
        ((b"0", 4, 0, (4,), (1,)), True),
        ((b"0", 4, 1, (2,), (2,)), True),
        ((b"0", 1 << 40, 0, (1 << 40,), (1,)), False),
        ((b"0", -4, 0, (4,), (1,)), False),
        ((b"0", 4, 0, (1 << 40,), (1,)), False),
        ((b"0", 4, 0, (1 << 20, 1 << 20), (0, 0)), False),
        ((b"0", 4, 1 << 20, (4,), (1,)), False),
        ((b"0", 4, -8, (4,), (1,)), False),
        ((b"0", 4, 3, (4,), (-1,)), False),
        ((b"9", 4, 0, (4,), (1,)), False),
        ((b"../version", 4, 0, (4,), (1,)), False),
    ],
)
def test_tensors_that_are_larger_than_their_file_are_refused(tmp_path, tensor, right):
    path = archive_of(tmp_path / "model.pt", tensor_of(*tensor))
    if right:
        assert dict(tensors_in(load_torch_file(path)))["a"].sum() == 0
        return
    with pytest.raises(ArtefactError):
        dict(tensors_in(load_torch_file(path)))
