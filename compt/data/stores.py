"""Object storage: what is in a store, its bytes, and what a fault of it means."""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
import netrc
import os
import random
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from compt.errors import ComptError, DataError
from compt.text import visible

READ_SECONDS = 30.0
"""Seconds without a byte after which a download is begun again where it stopped."""
ATTEMPTS = 8
"""Attempts in a row without a byte after which reading stops."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 20.0
"""Seconds between two attempts: doubled each time, and between a half and the whole of it by chance."""
_FINAL = re.compile(r"status code: (400|404|501)|redirect without LOCATION|non-partial response|builder error")
"""What a store or obstore answers to a request that it will never fulfil."""
_REFUSED = re.compile(r"status code: 40[13]")
NEVER = threading.Event()
_PIECE = 1 << 20
_TIME = "changed "
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
"""Variables with the address of a server that speaks a store's protocol, which may be without TLS."""
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Found(NamedTuple):
    """An object in a store: its key, its size in bytes, and its ETag, or the time of its last change without one."""

    key: str
    size: int
    tag: str


class MissingError(DataError):
    """There is no such object, or it may not be read: stores do not always say which."""


class ChangedError(Exception):
    """The object is not the one that was asked for."""


class _Objects:
    """Objects of one bucket or host, through obstore, which makes one attempt at each request."""

    def __init__(self, root: str) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ImportError:
            raise DataError(f"{root}: object storage is read with obstore: pip install 'compt[remote]'") from None
        options: dict[str, Any] = {"read_timeout": timedelta(seconds=READ_SECONDS), "timeout": timedelta(days=1)}
        profile = _profile(root) if root.startswith("s3:") else {}
        places = (root, profile.get("endpoint"), *map(os.environ.get, _ENDPOINTS))
        plain = any(place.startswith("http:") for place in places if place)
        self._obstore = obstore
        self._store = from_url(
            root,
            client_options={**options, "allow_http": plain, **(_netrc(root) if root.startswith("http") else {})},
            retry_config={"max_retries": 0},
            **profile,
        )

    def head(self, key: str) -> Found:
        return _found(self._obstore.head(self._store, key))

    def under(self, prefix: str) -> list[Found]:
        return [_found(meta) for part in self._obstore.list(self._store, prefix=prefix) for meta in part]

    def stream(self, wanted: Found, first: int, last: int) -> Iterator[Any]:
        """Bytes `first` to `last`, which is excluded. Raises ChangedError for another object."""
        named = not wanted.tag.startswith(("W/", _TIME))  # weak tags never match
        match = {"if_match": f'"{wanted.tag}"'} if named else {}
        try:
            got = self._obstore.get(self._store, wanted.key, options={"range": (first, last), **match})
        except self._obstore.exceptions.PreconditionError:
            raise ChangedError from None
        if _found(got.meta)[1:] != wanted[1:]:
            raise ChangedError
        yield from got.stream(min_chunk_size=_PIECE)


def _found(meta: Any) -> Found:
    # Azure's lists have tags without quotation marks.
    tag = (meta["e_tag"] or "").strip('"') or _TIME + meta["last_modified"].isoformat()
    return Found(meta["path"], meta["size"], tag)


class _HubObjects:
    """Objects of Hugging Face's hub, for which obstore has no driver."""

    def __init__(self) -> None:
        from huggingface_hub import HfFileSystem

        self._files: Any = HfFileSystem(skip_instance_cache=True, use_listings_cache=False)

    def head(self, key: str) -> Found:
        return Found(key, (info := self._files.info(key))["size"], info["blob_id"])

    def under(self, prefix: str) -> list[Found]:
        listed = self._files.ls(prefix.rpartition("/")[0], detail=True)
        return [Found(info["name"], info["size"], info["blob_id"]) for info in listed if info["type"] == "file"]

    def stream(self, wanted: Found, first: int, last: int) -> Iterator[Any]:
        """Bytes `first` to `last`, which is excluded. Raises ChangedError for another object."""
        if self.head(wanted.key) != wanted:
            raise ChangedError
        for start in range(first, last, 8 * _PIECE):
            yield self._files.cat_file(wanted.key, start=start, end=min(start + 8 * _PIECE, last))


@functools.cache
def objects(root: str) -> _Objects | _HubObjects:
    """The store at `scheme://bucket`."""
    return _HubObjects() if root.startswith("hf:") else _Objects(root)


def _profile(root: str) -> dict[str, Any]:
    """Credentials, region and address of a profile, which obstore does not read.

    Raises DataError, which holds nothing that the profile or its helper programs say.
    """
    home = Path(os.path.expanduser("~/.aws"))
    named = bool(os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE"))
    keys = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials").exists()
    settings = Path(os.environ.get("AWS_CONFIG_FILE") or home / "config").exists()
    # As in AWS's own libraries, keys in the environment come before a profile.
    if {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"} & set(os.environ) or not (named or keys or settings):
        return {}
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if not (named or keys):  # a region alone, beside the role of the machine
            return {}
        raise DataError("profiles in ~/.aws are read with boto3: pip install boto3, or set AWS_ACCESS_KEY_ID") from None
    try:
        session = boto3.Session()
        if session.get_credentials() is None:
            return {}
        # botocore renews credentials 10 minutes before their end: those kept for longer could end in use.
        provider = Boto3CredentialProvider(session, ttl=timedelta(minutes=5))
        provider()
        found: dict[str, Any] = {"credential_provider": provider}
        if not any(map(os.environ.get, _ENDPOINTS)):
            found["endpoint"] = session.client("s3").meta.endpoint_url
    except (BotoCoreError, ClientError) as error:
        cause = type(error).__name__
        raise DataError(
            f"{root}: the AWS profile gives no credentials ({cause}); 'aws sts get-caller-identity' shows why"
        ) from None
    return found


def _netrc(root: str) -> dict[str, Any]:
    """The user and password of a host, as curl and others find them."""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if known := netrc.netrc(os.environ.get("NETRC")).authenticators(urllib.parse.urlsplit(root).hostname or ""):
            word = base64.b64encode(f"{known[0]}:{known[2]}".encode()).decode()
            return {"default_headers": {"Authorization": f"Basic {word}"}}
    return {}


def _reason(error: BaseException) -> str:
    """Why an attempt failed, without the address and its credentials, which obstore puts into its messages."""
    text = str(error)
    if found := re.search(r"status code: (\d+ [A-Za-z ]+)", text):
        code = re.search(r"<Code>([A-Za-z.]{1,60})</Code>", text)  # by a server: only what is sure to be a name
        return found[1].strip() + (f": {code[1]}" if code else "")
    causes = [word for word in ("TimedOut", "ConnectionReset", "ConnectionRefused", "dns error") if word in text]
    line = visible(re.sub(r"\w+://\S+", "(address)", text.partition("\n")[0])[:300], "")
    return ", ".join(causes) or line or type(error).__name__


def failed_attempt(error: Exception, failed: int, what: str, stop: threading.Event) -> None:
    """Wait after attempt number `failed`. Raises DataError after the last one, and where another is of no use."""
    if isinstance(error, ComptError | CancelledError):
        raise error
    if isinstance(error, FileNotFoundError):
        raise MissingError(f"there is no {what} in the store") from None
    if isinstance(error, ChangedError):
        raise DataError(
            f"{what} has changed in the store since it was opened; put the old shard back, or start the same command "
            "again to index the new one"
        ) from None
    text = str(error)
    if "169.254.169.254" in text:
        raise DataError(f"{what}: no credentials in the environment, a profile or the machine's metadata") from None
    denied = type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError")
    if denied or _REFUSED.search(text):  # the latter for lists
        raise MissingError(
            f"{what}: the store refuses access ({_reason(error)}); check the credentials in the environment, the "
            "profile or the role of the machine, and that the shard exists"
        ) from None
    # S3's RequestTimeout is a 400, and passes.
    if _FINAL.search(text) and "<Code>RequestTimeout</Code>" not in text:
        reason = _reason(error)
        if reason == "400 Bad Request":  # of a HEAD, which has no body that would say more
            reason += "; such as for credentials that have expired, or another region"
        raise DataError(f"{what} cannot be read: {reason}") from None
    if failed == ATTEMPTS:
        raise DataError(f"{what} cannot be read after {failed} attempts: {_reason(error)}") from None
    wait = min(FIRST_WAIT * 2.0 ** (failed - 1), LONGEST_WAIT) * random.uniform(0.5, 1)
    _log.warning("%s: %s; attempt %d of %d in %.1f s", what, _reason(error), failed + 1, ATTEMPTS, wait)
    if stop.wait(wait):
        raise CancelledError


def again(action: Callable[[], _T], what: str) -> _T:
    """What a request gives, made again after faults. `what` names it in messages. Raises DataError."""
    failed = 0
    while True:
        try:
            return action()
        except Exception as error:
            failed += 1
            failed_attempt(error, failed, what, NEVER)
