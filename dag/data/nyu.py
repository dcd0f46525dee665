"""NYU-Depth v2, the labelled set: 1449 photographs of rooms, 480 x 640, with dense (in-painted) depth.

Silberman, Hoiem, Kohli and Fergus: "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012. It is read from the
official `nyu_depth_v2_labeled.mat` or from a folder with `rgb/NNNN.jpg` and `depth/NNNN.png` (16 bits, millimetres), NNNN the
official 1-based index. The official `splits.mat`, 795 for training and 654 for testing, lies in the folder or beside the .mat file.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dag.data.domain import Dataset
from dag.data.folder import match, read_depth, read_image

SHAPE = (480, 640)
SPLITS = {"train": "trainNdxs", "test": "testNdxs"}  # names in splits.mat
MAT = "nyu_depth_v2_labeled.mat"
ROOT = "DAG_NYU_ROOT"  # environment variable with the place of the data, where the config names none


def dataset(size: int, split: str | None, root: str | None = None) -> NYUDepthV2:
    """The domain `nyu` (see `dag.data.domain`); size is the study's own, pictures are scaled by whoever reads them."""
    root = root or os.environ.get(ROOT)
    if not root:
        raise ValueError(f"the place of NYU-Depth v2 is not known: expected it in the config (domain.root) or in the environment ({ROOT})")
    return NYUDepthV2(root, split)


class NYUDepthV2(Dataset):
    """One official split, or all pictures, in the order of their indices. path: the .mat file or a folder; split: "train", "test" or None.

    `id` is the official 1-based index. Raises FileNotFoundError where a file is missing, ValueError naming one that is not what it should
    be, or a split that names a picture that is not there.
    """

    # Around each photograph lies a white frame of up to eight pixels, from the registration of colour and depth.
    part = (slice(8, 472), slice(8, 632))

    def __init__(self, path: str | Path, split: str | None = None):
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of NYU-Depth v2")
        path = path / MAT if (path / MAT).is_file() else path
        self.pictures = _Files(path) if path.is_dir() else _Matlab(path)
        home = path if path.is_dir() else path.parent
        self.indices = self.pictures.indices if split is None else _split(home / "splits.mat", split)
        if missing := sorted(set(self.indices) - set(self.pictures.indices)):
            raise ValueError(f"{home / 'splits.mat'}: split {split!r} names picture {missing[0]}; {path} has {len(self.pictures.indices)} pictures without it")

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int) -> np.ndarray:
        """(480, 640, 3) uint8."""
        image = self.pictures.image(self.id(i))
        if image.shape[:2] != SHAPE:
            raise ValueError(f"{self.name(i)}: {image.shape[0]} x {image.shape[1]} pixels, expected {SHAPE[0]} x {SHAPE[1]}")
        return image

    def depth(self, i: int) -> np.ndarray:
        """(480, 640) float32, metres. Raises ValueError on a depth that is 0, negative or not finite: this set's is dense."""
        depth = self.pictures.depth(self.id(i))
        if unknown := int((~(np.isfinite(depth) & (depth > 0))).sum()):
            raise ValueError(f"{self.name(i)}: depth is 0, negative or not finite at {unknown} pixels, expected dense depth: `depths`, not `rawDepths`")
        return depth

    def id(self, i: int) -> int:
        return self.indices[i]

    def name(self, i: int) -> str:
        return f"{self.pictures.path}: picture {self.id(i)}"


def _split(file: Path, split: str) -> list[int]:
    """Official indices of a split, ascending."""
    from scipy.io import loadmat

    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split of NYU-Depth v2, expected one of {', '.join(SPLITS)}")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; it lists the official splits")
    try:
        content = loadmat(file)
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise ValueError(f"{file}: not a readable .mat file ({' '.join(str(error).split())[:120]})") from None
    if missing := [name for name in SPLITS.values() if name not in content]:
        raise ValueError(f"{file}: has no {missing[0]}, expected the official list of indices")
    listed = {name: content[name].ravel() for name in SPLITS.values()}
    for name, indices in listed.items():
        if not np.issubdtype(indices.dtype, np.integer) or not indices.size:
            raise ValueError(f"{file}: {name} holds {indices.size} values of {indices.dtype}, expected whole numbers from 1")
    pictures, times = np.unique(np.concatenate(list(listed.values())), return_counts=True)
    if (times > 1).any():
        raise ValueError(f"{file}: picture {pictures[times > 1][0]} is listed {times.max()} times, expected every picture in one split, once")
    return sorted(map(int, listed[SPLITS[split]]))


class _Files:
    """The folder form."""

    def __init__(self, path: Path):
        self.path = path
        for name in ("rgb", "depth"):
            if not (path / name).is_dir():
                raise FileNotFoundError(f"{path / name}: no such folder; expected {MAT}, or folders rgb and depth, in {path}")
        names = sorted(f.stem for f in (path / "rgb").glob("*.jpg"))
        if odd := next((name for name in names if not name.isdecimal()), None):
            raise ValueError(f"{path / 'rgb' / odd}.jpg: expected a name of digits, the official index")
        match(path / "depth", names)
        self.files = {int(name): name for name in names}
        if double := sorted(set(names) - set(self.files.values())):
            raise ValueError(f"{path / 'rgb'}: {double[0]}.jpg and {self.files[int(double[0])]}.jpg are pictures of the same index")
        self.indices = sorted(self.files)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.path / "rgb" / f"{self.files[index]}.jpg")

    def depth(self, index: int) -> np.ndarray:
        return read_depth(self.path / "depth" / f"{self.files[index]}.png", 0.001, SHAPE)


class _Matlab:
    """The official file: HDF5, whose axes are the reverse of MATLAB's."""

    def __init__(self, path: Path):
        try:
            import h5py
        except ModuleNotFoundError:
            raise ValueError(f"{path}: the package h5py is needed to read it: pip install h5py") from None
        self.path = path
        try:
            self.file = h5py.File(path, "r")
        except OSError as error:
            with open(path, "rb") as file:
                old = file.read(10) == b"MATLAB 5.0"
            why = "a MATLAB 5 file, as splits.mat is" if old else " ".join(str(error).split())[:120]
            raise ValueError(f"{path}: not a readable HDF5 file ({why}); expected the labelled set, nyu_depth_v2_labeled.mat") from None
        if missing := [name for name in ("images", "depths") if not isinstance(self.file.get(name), h5py.Dataset)]:
            raise ValueError(f"{path}: has no dataset {', '.join(missing)}; it holds {', '.join(sorted(self.file)) or 'nothing'}")
        count, (height, width) = self.file["depths"].shape[0], SHAPE
        for name, dtype, expected in (("images", "uint8", (count, 3, width, height)), ("depths", "float32", (count, width, height))):
            found = self.file[name]
            if found.shape != expected or found.dtype != dtype:
                raise ValueError(f"{path}: {name} is {found.dtype} of shape {found.shape}, expected {dtype} of shape {expected}")
        self.indices = list(range(1, count + 1))

    def image(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self._read("images", index).transpose(2, 1, 0))

    def depth(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self._read("depths", index).T)

    def _read(self, name: str, index: int) -> np.ndarray:
        try:
            return self.file[name][index - 1]
        except OSError as error:
            raise ValueError(f"{self.path}: {name} of picture {index} is damaged ({' '.join(str(error).split())[:120]})") from None
