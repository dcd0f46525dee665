"""Several processes that share every batch of a training, data parallel through Hugging Face accelerate: one on each GPU, or on the CPU."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dag.accelerator import multiply_in_tf32
from dag.interruption import Interrupted, noticing

if TYPE_CHECKING:
    from accelerate import Accelerator

_USER_ERRORS = (ValueError, FileNotFoundError, FloatingPointError, OSError, Interrupted)


class Alone:
    """What a training asks of accelerate's Accelerator, for one process by itself.

    Not an Accelerator of one: its settings are those of the whole program, which may be a user's that has its own.
    """

    process_index = 0

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value

    def wait_for_everyone(self) -> None:
        pass


def team(processes: int) -> Accelerator | Alone:
    """Who shares a training with this process: accelerate's view of the processes of `in_processes`, or nobody.

    Raises ValueError where there are more or fewer of them.
    """
    if processes == 1:
        return Alone()
    found = dist.get_world_size() if dist.is_initialized() else 1
    if found != processes:
        raise ValueError(f"the process group has {found} members, expected processes = {processes}")
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def in_processes(function: Callable, processes: int, *arguments) -> None:
    """Call function(rank, *arguments) in this process, or in several, in each of which `team()` knows the others.

    On GPUs each process has one as its current device, and they talk through NCCL; where there are fewer GPUs than processes these share them, and without
    one they compute on the CPU, one thread each: both talk through gloo, over loopback.
    When one of them raises, the others are ended; what a user can mend (_USER_ERRORS) is raised here as it was there.
    A signal that asks this process to stop is handed on to them.
    """
    if processes == 1:
        function(0, *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        members = torch.multiprocessing.spawn(_member, (processes, folder, function, arguments), processes, join=False)

        def hand_on(number: int) -> None:
            for process in members.processes:
                if process.is_alive():
                    os.kill(process.pid, number)

        try:
            with noticing(hand_on) as asked_to_stop:
                while not members.join():
                    pass
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException):
            for report in sorted(Path(folder).glob("error*")):
                raise pickle.loads(report.read_bytes()) from None
            if asked_to_stop():  # before they could notice it
                raise Interrupted(asked_to_stop(), "there was nothing to save yet") from None
            raise


def place(rank: int, processes: int, gpus: int) -> tuple[int, str]:
    """(number of its GPU, or of itself where there is none; backend) of a process. NCCL refuses two processes on one GPU."""
    return (rank % gpus if gpus else rank), ("nccl" if gpus >= processes else "gloo")


def _member(rank: int, processes: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    gpus = torch.cuda.device_count()
    local, backend = place(rank, processes, gpus)
    if gpus:
        torch.cuda.set_device(local)
    multiply_in_tf32()
    # What accelerate knows its processes by; without the last it would choose a number of threads of its own.
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    # The meeting place is a file, not a port that another training may have.
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    try:
        function(rank, *arguments)
    except _USER_ERRORS as error:
        (Path(folder) / f"error{rank}").write_bytes(pickle.dumps(error))
        raise
    finally:
        dist.destroy_process_group()
