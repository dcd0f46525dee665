"""The command: `dag STAGE --config FILE ...`, one stage called, user errors in one line.

The options of a stage are the keyword arguments of its function; what their words mean, and an example of each stage, is in `dag.usage`.
A stage whose function takes no study (`dag convert IN OUT`, `dag doctor`) needs no config.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import dag
from dag.devices import reserved
from dag.interruption import Interrupted
from dag.usage import Parser, epilog, overview, word

# Two OpenMP threads on a busy machine lose far more to spinning than they gain; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

STAGES = {
    "asset": "assets",
    "fetch": "assets",
    "prepare": "data",
    "label": "labelling",
    "pretrain": "pretraining",
    "snapshot": "pretraining",
    "convert": "pretraining",
    "features": "models",
    "heads": "models",
    "prior": "models",
    "judge": "models",
    "sample": "sampling",
    "join": "shards",
    "trajectory": "sampling",
    "describe": "evaluation",
    "moments": "evaluation",
    "measure": "evaluation",
    "scale": "evaluation",
    "runs": "evaluation",
    "geometry": "evaluation",
    "known_answers": "known_answers",
    "downstream": "downstream",
    "plan": "planning",
    "picture": "picture",
    "doctor": "doctor",
    "verify": "verify",
}
# Stages whose rules ask for a GPU.
ON_DEVICE = {"pretrain", "features", "heads", "prior", "judge", "sample", "trajectory", "describe", "known_answers", "downstream", "label"}
# Of these, trainings that several processes may share, each on a GPU of its own; with the config section that says how many.
SHARED = {"pretrain": "unet", "prior": "prior"}
# Stages that take the same step again and again.
SAMPLING = {"sample", "trajectory", "picture"}


def keep_freed_memory(large: bool = False) -> None:
    """Let this process keep what it frees instead of handing it back to the system at once.

    Tensors of a few MB come and go thousands of times; by default glibc gives their pages back each time and the kernel clears new
    ones for the next, which costs a guided step 15 % of its CPU time. Elsewhere than on glibc nothing happens.

    large: keep tensors over 32 MB as well, those of pictures of 256x256. For a process that takes one step again and again; where
    arrays of many sizes come and go, the holes between them would add up.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX of malloc.h
    if large:
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)
    else:
        mallopt(trim_threshold, 512 * 2**20)
        mallopt(mmap_threshold, 32 * 2**20)  # the most that every version of glibc takes


def collect_seldom() -> None:
    """Have the garbage collector look seldom while this process fills with modules, and not once more when it ends.

    Importing torch and diffusers makes a million objects that all stay: to look through them at every 700th is a third of a start's CPU
    time. What a stage itself leaves behind is still collected.
    """
    gc.set_threshold(100_000, 20, 100)
    atexit.register(gc.freeze)


def stage(name: str) -> Callable:
    return getattr(importlib.import_module(f"dag.stages.{STAGES[name]}"), name)


def _stage_parser(name: str, function: Callable) -> argparse.ArgumentParser:
    parser = Parser(prog=f"dag {name}", description=inspect.getdoc(function), epilog=epilog(name), formatter_class=argparse.RawDescriptionHelpFormatter)
    parameters = dict(inspect.signature(function).parameters)
    if parameters.pop("study", None):
        parser.add_argument("--config", required=True, metavar="FILE", help="the study's config, e.g. config/rooms.yaml")
    parameters.pop("threads", None)
    parser.add_argument("--threads", type=int, default=1, metavar="INT", help="CPU threads of this process (default 1)")
    hints = typing.get_type_hints(function)
    for key, parameter in parameters.items():
        kind = hints[key]
        if isinstance(kind, types.UnionType):  # Path | None
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        options = {"help": word(name, key, parameter.default)}
        if typing.get_origin(kind) is list:
            options["nargs"], kind = "+", typing.get_args(kind)[0]
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options.update(type=kind, metavar=kind.__name__.upper())
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            options["metavar"] = key.upper()  # nothing else names it
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            parser.add_argument(f"--{key.replace('_', '-')}", required=parameter.default is inspect.Parameter.empty, **options)
        else:
            parser.add_argument(key, **options)
    return parser


def _tell_files(study, options: dict) -> None:
    """Let the study know which of a stage's options are files: `out` and `metrics` are made, the others are read."""
    files = {key: value if isinstance(value, list) else [value] for key, value in options.items()}
    files = {key: [path for path in paths if isinstance(path, Path)] for key, paths in files.items()}
    study.other_outputs = files.pop("metrics", [])
    study.inputs = [path for key, paths in files.items() if key != "out" for path in paths]


@contextlib.contextmanager
def _device(kind: str, count: int) -> Iterator[None]:
    """A device for this process, or one for each of its `count`; a GPU that must be there has to work, too."""
    with reserved(kind, count=count) as device:
        from dag.accelerator import here, multiply_in_tf32

        if kind == "gpu" and here().type == "cpu":
            raise ValueError(f"compute.device is 'gpu', but torch finds no CUDA device where CUDA_VISIBLE_DEVICES is {device!r}")
        multiply_in_tf32()
        yield


def _unnamed(error: Exception, options: dict) -> str:
    """The file that was being written where the system's error, of a full disk in the midst of it, does not say which."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is not None or "out" not in options:
        return ""
    files = options["out"] if isinstance(options["out"], list) else [options["out"]]
    return f"{', '.join(map(str, files))}: "


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. User errors are one line on stderr and status 2, a signal to stop one line and 128 + its number."""
    argv = list(sys.argv[1:] if argv is None else argv)
    top = Parser(prog="dag", usage="dag STAGE ...", description=overview(STAGES), formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    top.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    top.add_argument("--version", action="version", version=f"dag {dag.__version__}", help=argparse.SUPPRESS)
    top.add_argument("stage", choices=STAGES, metavar="STAGE", help=argparse.SUPPRESS)
    name = top.parse_args(argv[:1] or ["--help"]).stage
    if name == "sample" and any(word.startswith("--model") for word in argv):
        name = "picture"  # samples of a model by itself, not of a run of a study
    collect_seldom()
    keep_freed_memory(large=name in SAMPLING)
    options: dict = {}
    try:
        from dag.stages.resources import processes
        from dag.stages.study import Study

        function = stage(name)
        options = vars(_stage_parser(name, function).parse_args(argv[1:]))
        study = [Study.load(options.pop("config"))] if "study" in inspect.signature(function).parameters else []
        threads = options.pop("threads")
        # A stage that imports torch later reads the variable.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        if "threads" in inspect.signature(function).parameters:
            options["threads"] = threads
        if study:
            _tell_files(study[0], options)
        count = processes(study[0], SHARED[name]) if name in SHARED else 1
        nothing = contextlib.nullcontext()
        with study[0].at_work() if study else nothing, _device(study[0].compute["device"], count) if study and name in ON_DEVICE else nothing:
            return function(*study, **{k: v for k, v in options.items() if v is not None}) or 0
    except (ValueError, FileNotFoundError, FloatingPointError, OSError) as error:
        if os.environ.get("DAG_TRACEBACK"):
            raise
        sys.stderr.write(f"dag {name}: {_unnamed(error, options)}{' '.join(str(error).split())}\n")
        return 2
    except ImportError as error:
        if os.environ.get("DAG_TRACEBACK") or (error.name or "").partition(".")[0] == "dag":
            raise
        sys.stderr.write(
            f"dag {name}: {error}: a package is missing or broken; pip install -c constraints.txt -e . in the project's folder installs what is needed\n"
        )
        return 2
    except Interrupted as stop:
        sys.stderr.write(f"dag {name}: {stop}\n")
        return 128 + stop.number


if __name__ == "__main__":
    sys.exit(main())
