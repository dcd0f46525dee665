"""Which accelerator a job may use: the one it was given, or a free one of the machine, held by a lock until the job ends."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "CUDA_VISIBLE_DEVICES"
KINDS = ("auto", "gpu", "cpu")


@contextmanager
def reserved(kind: str, folder: Path | None = None) -> Iterator[str]:
    """Within, CUDA_VISIBLE_DEVICES names the one device that this process may use, which is yielded; "" is the CPU.

    kind: "gpu" needs one, "auto" takes the CPU where there is none, "cpu" never uses one. A single id in CUDA_VISIBLE_DEVICES, as Slurm sets
    it, is taken as it is; among several, or all of the machine where the variable is not set, the first that no other job has locked, after
    waiting for one if need be. folder: of the lock files, one for all jobs of a machine. Call it before CUDA is first used.
    Raises ValueError where a GPU is needed and there is none.
    """
    if kind not in KINDS:
        raise ValueError(f"compute.device is {kind!r}, expected one of {KINDS}")
    given = os.environ.get(VARIABLE)
    ids = [] if kind == "cpu" else [i for i in given.split(",") if i.strip()] if given is not None else _of_this_machine()
    if kind == "gpu" and not ids:
        found = f"{VARIABLE} is {given!r}" if given is not None else "this machine has no NVIDIA device"
        raise ValueError(f"compute.device is 'gpu', but {found}; run on a node with a GPU, or set compute.device to auto to fall back on the CPU")
    with _free(ids, folder or Path(tempfile.gettempdir()) / f"dag-devices-{os.getuid()}") as device:
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
def _free(ids: Sequence[str], folder: Path) -> Iterator[str]:
    """Hold one of the ids. The kernel drops the lock when the process ends, however it ends."""
    if not ids or os.environ.get(VARIABLE) == ids[0]:
        yield "".join(ids)
        return
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    waiting = False
    while True:
        for device in ids:
            with open(folder / f"{device}.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield device
                return
        if not waiting:
            sys.stderr.write(f"waiting for one of the devices {', '.join(ids)}: other jobs use them all\n")
            waiting = True
        time.sleep(0.2)
