"""Files that are never seen half written, and locks that end with their process."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file open under a temporary name, which is renamed at the end, so that it is never seen
    half written; nothing is left of it where an exception ends it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file at once, see `writing`."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """`write_atomically` of a JSON value."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | os.PathLike, default: Any = None) -> Any:
    """A file's JSON value, or `default` where there is no file."""
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else default


def hold(path: str | os.PathLike, *, wait: bool) -> IO[str]:
    """A file opened for reading and writing and locked until it is closed or the process ends.

    Raises:
      BlockingIOError: another process holds it, and `wait` is false; `filename2` is what that
        process wrote into it.
      OSError: it cannot be written.
    """
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        file.seek(0)
        error.filename2 = file.read().strip()
        file.close()
        raise
    return file
