"""Which accelerators a job may use: those it was given, or free ones of the machine, held by locks until the job ends."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

VARIABLE = "CUDA_VISIBLE_DEVICES"
KINDS = ("auto", "gpu", "cpu")


@contextmanager
def reserved(kind: str, folder: Path | None = None, count: int = 1) -> Iterator[str]:
    """Within, CUDA_VISIBLE_DEVICES names the devices that this process may use, `count` or as many as there are; they are yielded, "" is the CPU.

    kind: "gpu" needs one, "auto" takes the CPU where there is none, "cpu" never uses one. As many ids as are wanted in CUDA_VISIBLE_DEVICES, as Slurm
    sets it, are taken as they are; among more, or all of the machine where the variable is not set, the first that no other job has locked, after
    waiting for them if need be. folder: of the lock files, one for all jobs of a machine. Call it before CUDA is first used.
    Raises ValueError where a GPU is needed and there is none, and where the folder is not this user's.
    """
    if kind not in KINDS:
        raise ValueError(f"compute.device is {kind!r}, expected one of {KINDS}")
    given = os.environ.get(VARIABLE)
    ids = [] if kind == "cpu" else [i for i in given.split(",") if i.strip()] if given is not None else _of_this_machine()
    if kind == "gpu" and not ids:
        found = f"{VARIABLE} is {given!r}" if given is not None else "this machine has no NVIDIA device"
        raise ValueError(f"compute.device is 'gpu', but {found}; run on a node with a GPU, or set compute.device to auto to fall back on the CPU")
    with _free(ids, min(count, len(ids)), folder or Path(tempfile.gettempdir()) / f"dag-devices-{os.getuid()}") as device:
        os.environ[VARIABLE] = device
        try:
            yield device
        finally:
            if given is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = given


def _of_this_machine() -> list[str]:
    """Indices of the NVIDIA devices, asked without CUDA."""
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


@contextmanager
def _free(ids: Sequence[str], count: int, folder: Path) -> Iterator[str]:
    """Hold so many of the ids. The kernel drops the locks when the process ends, however it ends."""
    if os.environ.get(VARIABLE) == ",".join(ids[:count]) or not ids:
        yield ",".join(ids)
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # In a temporary folder that all users share, another one may have made it first, with links in it to files of ours.
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder}: is a link or another user's, expected a folder of your own for the locks of devices; remove it, or set TMPDIR")
    waiting = False
    while True:
        # Too few free ones are given back, lest two jobs wait for each other's.
        with ExitStack() as held:
            taken = []
            for device in ids:
                lock = held.enter_context(open(folder / f"{device.replace('/', '_')}.lock", "a"))  # a MIG's id may have slashes
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                taken.append(device)
                if len(taken) == count:
                    yield ",".join(taken)
                    return
        if not waiting:
            wanted = "one" if count == 1 else count
            sys.stderr.write(f"waiting for {wanted} of the devices {', '.join(ids)}: other jobs use them\n")
            waiting = True
        time.sleep(0.2)
