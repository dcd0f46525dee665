"""Arrays of .npz files a part at a time: of a large run neither the pictures nor their depth fit in memory. Knows no torch."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from dag.stages.artefacts import writing

PART = 1024  # pictures in memory at a time


def names(path: str | Path) -> list[str]:
    """Of the arrays of an .npz file. Raises ValueError naming a file that is missing or not whole."""
    with naming(path), zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def rows_of(path: str | Path, name: str, count: int) -> Iterator[np.ndarray]:
    """`count` rows after another of an array of an .npz file; the last part may have fewer.

    Raises ValueError naming a file that is missing, not whole or without this array. A damaged part shows after the last one at the latest, by its checksum.
    """
    with naming(path), zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as stream:
        header = npy.read_array_header_1_0 if npy.read_magic(stream) == (1, 0) else npy.read_array_header_2_0
        shape, by_columns, dtype = header(stream)
        if by_columns or dtype.hasobject or not shape:
            raise ValueError(f"{name} does not lie there row by row")
        for start in range(0, shape[0], count):
            part = np.empty((min(count, shape[0] - start), *shape[1:]), dtype)
            if stream.readinto(part.reshape(-1).view(np.uint8)) < part.nbytes:
                raise ValueError(f"{name} ends before row {start + len(part)} of {shape[0]}")
            yield part


def picked(path: str | Path, name: str, index: Sequence[int]) -> np.ndarray:
    """Rows of an array of an .npz file by their numbers, in this order, without the others in memory. Raises ValueError as `rows_of`, IndexError."""
    wanted, found, start = np.asarray(index, int), None, 0
    for part in rows_of(path, name, PART):
        inside = (start <= wanted) & (wanted < start + len(part))
        found = np.empty((len(wanted), *part.shape[1:]), part.dtype) if found is None else found
        found[inside] = part[wanted[inside] - start]
        start += len(part)
        if start > wanted.max(initial=-1):
            break
    if len(wanted) and not 0 <= wanted.min() <= wanted.max() < start:
        raise IndexError(f"{path}: has {start} rows of {name}, expected row {wanted.min()} to {wanted.max()}")
    return found


@contextmanager
def growing(out: Path, count: int, **whole: object) -> Iterator[Callable[..., None]]:
    """Within, call the yielded function with the next rows of every array by name; at the end they are an .npz file, after the arrays `whole`.

    Rows wait in a hidden folder beside `out`. Raises ValueError where an array has other than `count` rows in the end.
    """
    folder, lengths = out.parent / f".{out.stem}.part", {}
    shutil.rmtree(folder, ignore_errors=True)  # of a killed job
    folder.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            streams = {}

            def add(**arrays: np.ndarray) -> None:
                for name, part in arrays.items():
                    if name not in streams:
                        streams[name] = stack.enter_context(open(folder / f"{name}.npy", "wb"))
                        write_header(streams[name], part, count)
                    streams[name].write(np.ascontiguousarray(part).data)
                    lengths[name] = lengths.get(name, 0) + len(part)

            yield add
        for name, length in lengths.items():
            if length != count:
                raise ValueError(f"{out}: {length} rows of {name} came, expected {count}")
        with writing(out) as aside, zipfile.ZipFile(aside, "w") as archive:
            for name, array in whole.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    npy.write_array(stream, np.asanyarray(array), allow_pickle=False)
            for name in lengths:
                with open(folder / f"{name}.npy", "rb") as source, archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    shutil.copyfileobj(source, stream, 1 << 20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_header(stream: BinaryIO, part: np.ndarray, count: int) -> None:
    """What NumPy's format has before the rows of an array: of `count` in all, each like those of `part`."""
    npy.write_array_header_1_0(stream, {"descr": npy.dtype_to_descr(part.dtype), "fortran_order": False, "shape": (count, *part.shape[1:])})


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """What reading an .npz file may raise, as a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run the stage that makes it first") from None
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]}") from None
    except Exception as error:  # zipfile and numpy raise many kinds for a torn file
        raise ValueError(f"{path}: not a whole .npz file ({error})") from None
