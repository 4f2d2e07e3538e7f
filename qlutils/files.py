"""Files that are whole or absent, that notice damage, and that one run at a time writes.

A file is written aside, synced and renamed. The footer of a result table (parquet) carries a
SHA-256 over every byte of the file, the table's key (what determines it) and the versions of the
libraries that made it.
"""

import hashlib
import json
import os
import re
import socket
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

LIBRARIES = (
    "qlutils",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "scikit-image",
    "matplotlib",
    "papermill",
)
_MARK = b"content-sha256:"


class StoreError(OSError):
    """Results cannot be written or shared; the message names the folder and what to do."""


def canonical(value):
    """One JSON text per value, for hashing; ValueError for what JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"units, configuration and parameters must be plain JSON values: {error}"
        ) from None


def sha256(value):
    """Hex SHA-256 of bytes, or of a value's canonical JSON."""
    return hashlib.sha256(
        value if isinstance(value, bytes) else canonical(value).encode()
    ).hexdigest()


def folder_hash(folder, pattern="*"):
    """SHA-256 over the files of a folder; of those above 256 MB the size and time stand for the
    content."""
    files = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
    return sha256([[file.name, file_hash(file)] for file in files])


def file_hash(file):
    """SHA-256 of a file's content; of one above 256 MB the size and time stand for it."""
    stat = os.stat(file)
    if stat.st_size < 2**28:
        return sha256(Path(file).read_bytes())
    return [stat.st_size, stat.st_mtime_ns]


@cache
def versions():
    """Installed versions of the libraries results depend on, by name."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_bytes(path, data):
    """Put `data` at `path`, whole or not at all. StoreError names the folder when it cannot be
    written."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise StoreError(
            f"cannot write results to {path.parent}: {error.strerror or error}. Free space "
            "or choose another output; finished work is kept, the same command resumes"
        ) from error
    finally:
        with suppress(OSError):  # the folder turned read-only: a later run removes it
            aside.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as indented JSON, whole or not at all."""
    write_bytes(path, _utf8(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"))


def _utf8(text):
    """A text as UTF-8; names of files that the locale could not read come out as they are on
    disk."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").encode("utf-8")


def sealed(value):
    """A dict as JSON holds it, with its own SHA-256 as "sha256"; `is_sealed` tells whether it still
    fits."""
    value = json.loads(_utf8(json.dumps(value, ensure_ascii=False, default=str)))
    return {**value, "sha256": sha256(value)}


def is_sealed(value):
    """Whether a value read from JSON is what `sealed` made, to the bit."""
    return isinstance(value, dict) and value.get("sha256") == sha256(
        {k: v for k, v in value.items() if k != "sha256"}
    )


def write_table(frame, path, key, **metadata):
    """Write a DataFrame as parquet under `key`, with JSON-able metadata. Equal content gives equal
    bytes."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    blank, sink = _MARK + b"0" * 64, pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {
                "key": key,
                "content": blank.decode(),
                "metadata": canonical({"versions": versions(), **metadata}),
            }
        )
    data = sink.getvalue().to_pybytes()
    at = data.rfind(blank) + len(_MARK)  # the digest's own place counts as zeros
    write_bytes(path, data[:at] + sha256(data).encode() + data[at + 64 :])


def read_table(path, key=None):
    """(table, metadata) of a valid file; else (None, what is wrong), and a warning that names the
    file."""
    try:
        data = Path(path).read_bytes()
        at = data.rfind(_MARK) + len(_MARK)
        if (
            at < len(_MARK)
            or sha256(data[:at] + b"0" * 64 + data[at + 64 :]).encode() != data[at : at + 64]
        ):
            raise ValueError("damaged (truncated, or changed after it was written)")
        file = pq.ParquetFile(pa.BufferReader(data))
        if key is not None and file.metadata.metadata[b"key"].decode() != key:
            raise ValueError("from another configuration or code version (its key is not its name)")
        return file.read().replace_schema_metadata(None), json.loads(
            file.metadata.metadata[b"metadata"]
        )
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        warnings.warn(f"result file {path} is not read: {error}", stacklevel=2)
        return None, str(error)


def read_metadata(path):
    """The metadata of a file of `write_table`, its content not checked; {} where there is no such
    file."""
    try:
        return json.loads(pq.read_metadata(path).metadata[b"metadata"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return {}


def as_frame(tables):
    """One DataFrame from tables in order; a column that is empty in one part takes the others'
    type."""
    return (
        pa.concat_tables(tables, promote_options="permissive").to_pandas()
        if tables
        else pd.DataFrame()
    )


@contextmanager
def locked(path, wait=3):
    """Hold the lock file `path`; StoreError, naming it and its holder, if that takes more than
    `wait` seconds.

    The system drops the lock when the holder dies, however it dies, and whoever has its number now.
    What dead writers of this machine left half-written in the lock's folder and below is removed on
    entry.
    """
    path, until = Path(path), time.monotonic() + wait
    try:
        while (stream := _lock(path)) is None and time.monotonic() < until:
            time.sleep(0.1)  # a killed run takes a moment to go
    except OSError as error:
        raise StoreError(
            f"cannot write results to {path.parent}: {error.strerror}. Choose another "
            "output, or move all results with QLUTILS_RUNS"
        ) from error
    if stream is None:
        holder = "another process"
        with suppress(OSError):
            holder = path.read_text(encoding="utf-8") or holder
        raise StoreError(
            f"another run writes here: {path} is held by {holder}. Wait for it, stop it, or "
            f"choose another "
            "output"
        )
    with stream:
        try:
            left = rf"\..+\.{re.escape(socket.gethostname())}\.(\d+)\.tmp"
            for aside in path.parent.rglob(".*.tmp"):
                if (made_by := re.fullmatch(left, aside.name)) and not _alive(int(made_by[1])):
                    aside.unlink(missing_ok=True)
            yield
        finally:
            with suppress(
                OSError
            ):  # the folder turned read-only: the file means nothing without a holder
                path.unlink()


def _lock(path):
    """The open lock file `path`, held; None if another process holds it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open(path, "ab+", buffering=0)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return stream
    except (
        BlockingIOError,
        FileNotFoundError,
    ):  # or its last holder removed it between our open and our lock
        pass
    except OSError:
        stream.close()
        raise
    stream.close()
    return None


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
