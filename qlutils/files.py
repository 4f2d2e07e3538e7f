"""Files that are whole or absent, that notice damage, and that one run at a time writes.

A file is written aside, synced and renamed. The footer of a result table (parquet) carries a
SHA-256 over every byte of the file, the table's key (what determines it) and the versions of the
libraries that made it.
"""

import fcntl
import hashlib
import json
import os
import socket
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

LIBRARIES = (
    "qlutils torch transformers tokenizers numpy scipy pandas pyarrow scikit-image matplotlib "
    "papermill"
).split()
LARGE = 2**28  # bytes: of a larger file the size and time stand for the content
LEFT_BEHIND = 600  # seconds after which nobody is still writing a file
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
    data = value if isinstance(value, bytes) else canonical(value).encode()
    return hashlib.sha256(data).hexdigest()


def folder_hash(folder):
    """SHA-256 over the names and `file_hash` of a folder's files."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return sha256([[file.name, file_hash(file)] for file in files])


def file_hash(file):
    """SHA-256 of a file's content; of one above `LARGE` the size and time stand for it."""
    stat = os.stat(file)
    if stat.st_size < LARGE:
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
    """Put `data` at `path`, whole or not at all; StoreError names a folder that takes no more."""
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
        raise _not_written(path.parent, error) from error
    finally:
        with suppress(OSError):  # the folder turned read-only: a later run removes it
            aside.unlink(missing_ok=True)


def _not_written(folder, error):
    return StoreError(
        f"cannot write results to {folder}: {error.strerror or error}. Free space, choose another "
        "output, or move all results with QLUTILS_RUNS; finished work is kept, the same command "
        "resumes"
    )


def json_bytes(value):
    """A value as indented JSON in UTF-8."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "replace")


def write_json(path, value):
    """Write a value as indented JSON, whole or not at all."""
    write_bytes(path, json_bytes(value))


def write_parquet(frame, path, key, **metadata):
    """Write a DataFrame as parquet under `key`, with JSON-able metadata; equal content gives
    equal bytes.

    The digest's own place counts as zeros."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    blank = _MARK + b"0" * 64
    sink = pa.BufferOutputStream()
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
    at = data.rfind(blank) + len(_MARK)
    write_bytes(path, data[:at] + sha256(data).encode() + data[at + 64 :])


def read_parquet(path, key=None):
    """(table, metadata) of a valid file; else (None, what is wrong), and a warning that names
    the file.

    key: what the table's own must be, if given."""
    try:
        data = Path(path).read_bytes()
        at = data.rfind(_MARK) + len(_MARK)
        blank = data[:at] + b"0" * 64 + data[at + 64 :]
        if at < len(_MARK) or sha256(blank).encode() != data[at : at + 64]:
            raise ValueError("damaged (truncated, or changed after it was written)")
        file = pq.ParquetFile(pa.BufferReader(data))
        footer = file.metadata.metadata
        if key is not None and footer[b"key"].decode() != key:
            raise ValueError("from another configuration or code version (its key is not its name)")
        return file.read().replace_schema_metadata(None), json.loads(footer[b"metadata"])
    except (OSError, ValueError) as error:
        warnings.warn(f"result file {path} is not read: {error}", stacklevel=2)
        return None, str(error)


def read_metadata(path):
    """The metadata of a `write_parquet` file, its content not checked; {} where there is none."""
    try:
        return json.loads(pq.read_metadata(path).metadata[b"metadata"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return {}


def as_frame(tables):
    """One DataFrame of tables in order; a column that is empty in one part takes the others'
    type."""
    if not tables:
        return pd.DataFrame()
    return pa.concat_tables(tables, promote_options="permissive").to_pandas()


@contextmanager
def locked(path, wait=3):
    """Hold the lock file `path`; StoreError names it and its holder after `wait` seconds in vain.

    The system drops the lock when its holder dies, however that happens; the file stays. What dead
    writers left half-written in the lock's folder and below is removed."""
    path = Path(path)
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = held.enter_context(open(path, "ab+", buffering=0))
            mine = _lock(stream, time.monotonic() + wait)
        except OSError as error:
            raise _not_written(path.parent, error) from error
        if not mine:
            raise StoreError(
                f"another run writes here: {path} is held by {path.read_text()}. Wait for it, stop "
                "it, or choose another output"
            )
        for aside in path.parent.rglob(".*.tmp"):
            with suppress(FileNotFoundError):  # its writer has just finished
                if time.time() - aside.stat().st_mtime > LEFT_BEHIND:
                    aside.unlink()
        yield


def _lock(stream, until):
    """Whether a file could be locked; it then holds the name of this process."""
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)  # a killed run takes a moment to go
        else:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return True
