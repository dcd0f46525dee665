"""Locks of a study's folder: who makes it, and who works on it. Knows no torch."""

from __future__ import annotations

import errno
import fcntl
import warnings
from pathlib import Path
from typing import TextIO

from dag.stages.validation import StudyError

ALONE, SHARED = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH


def locked(path: Path, how: int, otherwise: str) -> TextIO:
    """A locked file; the kernel drops the lock with the file. how: ALONE, or SHARED, which waits for whoever has it alone.

    Raises StudyError naming the folder, with what is otherwise the case, where it is another's. A file system without locks is told in a warning.
    """
    file = open(path, "a+")  # noqa: SIM115 both ways: a network's file system locks what is open for it
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise StudyError(f"{path.parent}: {otherwise}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"{path.parent}: its file system has no locks ({error.strerror}); start no second Snakemake on this study", stacklevel=3)
    return file
