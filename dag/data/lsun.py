"""LSUN (Yu et al. 2015, arXiv 1506.03365) as it is downloaded, a database of encoded pictures (LMDB), or exported to a folder or zip of pictures.

Pictures become squares as guided-diffusion made them from LSUN: the short side is scaled to the size by area averages (PIL's BOX), then the centre
is cut out. They have no depth; who gives them one is the study's `estimator`.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dag.data.domain import Dataset, Pictures

FILTERS = {"area": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def dataset(size: int, split: str | None, root: str, order: int = 0, resample: str = "area", corrupt: float = 0.001) -> LSUN:
    """The domain `lsun` (see `dag.data.domain`); size is the studies' own."""
    return LSUN(_place(Path(root), split), order, resample, corrupt)


class LSUN(Dataset):
    """The pictures of a database, folder or zip. An id is a position in the order of their keys or names.

    order: seed of the shuffle that gives positions their pictures, so that every stretch of positions is a random subset that is the same
    everywhere. resample: "area" or "lanczos". corrupt: largest share of the pictures asked for that may be unreadable; these are left out,
    counted in `unreadable`. Raises FileNotFoundError without the place, ValueError where it holds no pictures or an option is unknown.
    """

    def __init__(self, place: str | Path, order: int = 0, resample: str = "area", corrupt: float = 0.001):
        self.place, self.corrupt, self.unreadable = Path(place), corrupt, {}
        if resample not in FILTERS:
            raise ValueError(f"domain.resample is {resample!r}, expected one of {', '.join(FILTERS)}")
        self.filter = FILTERS[resample]
        if not self.place.exists():
            raise FileNotFoundError(f"{self.place}: no such database, folder or zip of LSUN pictures")
        self.keys, self.read = _source(self.place)
        if not len(self.keys):
            raise ValueError(f"{self.place}: holds no pictures")
        self.order = np.random.default_rng(order).permutation(len(self.keys))

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> np.ndarray:
        """(h, w, 3) uint8. Raises ValueError naming a picture that does not decode."""
        return np.asarray(self._picture(i))

    def depth(self, i: int) -> None:
        return None

    def id(self, i: int) -> int:
        return int(self.order[i])

    def name(self, i: int) -> str:
        return f"{self.place}: {_text(self.keys[self.id(i)])}"

    def squares(self, index: np.ndarray, size: int) -> Pictures:
        """The pictures at some positions that can be read, as squares. Raises ValueError where more than the share `corrupt` cannot."""
        images, ids = np.empty((len(index), size, size, 3), np.uint8), []
        wrong = {}
        for i in tqdm(map(int, index), total=len(index), desc=self.place.name, unit="picture", disable=not sys.stderr.isatty(), mininterval=1):
            try:
                images[len(ids)] = square(self._picture(i), size, self.filter)
                ids.append(self.id(i))
            except ValueError as error:
                wrong[self.name(i)] = str(error)
            if len(wrong) > self.corrupt * len(index):
                raise ValueError(
                    f"{next(iter(wrong.values()))}; {len(wrong)} of {len(ids) + len(wrong)} pictures so far are not readable, "
                    f"more than the share domain.corrupt = {self.corrupt:g} of {len(index)} allows"
                )
        self.unreadable |= wrong
        return Pictures(images[: len(ids)], None, None, np.array(ids, np.int64))

    def _picture(self, i: int) -> Image.Image:
        try:
            picture = Image.open(io.BytesIO(self.read(self.keys[self.id(i)])))
            return picture.convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
            why = "of no known format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())[:120]
            raise ValueError(f"{self.name(i)}: not a readable picture ({why})") from None


def square(picture: Image.Image, size: int, resample: Image.Resampling) -> np.ndarray:
    """(size, size, 3) uint8: the short side scaled to size, the long one with it, to whole pixels; then the centre, the odd pixel left and above."""
    scale = size / min(picture.size)
    resized = picture.resize(tuple(round(side * scale) for side in picture.size), resample)
    left, top = ((side - size) // 2 for side in resized.size)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _place(root: Path, split: str | None) -> Path:
    """Where a split lies: <root>/<split>, <root>/<split>.zip, or as LSUN names it, <root>/<category>_<split>_lmdb."""
    if split is None:
        return root
    if Path(split).name != split or split in (".", ".."):
        raise ValueError(f"{split!r} is no split of {root}: a split is a name")
    places = [root / split, root / f"{split}.zip", *sorted(root.glob(f"*_{split}_lmdb"))]
    found = [place for place in places if place.exists()]
    if len(found) != 1:
        names = ", ".join(place.name for place in found) or "none"
        raise FileNotFoundError(f"{root}: split {split!r} should be one of {split}, {split}.zip and <category>_{split}_lmdb there, found {names}")
    return found[0]


def _source(place: Path) -> tuple[np.ndarray, Callable[[str], bytes]]:
    """The sorted keys of the pictures in a place, and what reads the bytes of one."""
    if place.is_file():
        return _zip(place)
    if (place / "data.mdb").is_file():
        return _database(place.resolve())
    names = sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
    return np.array(names, object), lambda name: (place / name).read_bytes()


def _zip(place: Path) -> tuple[np.ndarray, Callable[[str], bytes]]:
    try:
        archive = zipfile.ZipFile(place)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{place}: not a whole zip file ({error}), expected one of pictures, or a folder or database of them") from None
    names = sorted(name for name in archive.namelist() if name.lower().endswith(_SUFFIXES))
    return np.array(names, object), archive.read


@cache  # a process may open a database only once
def _database(place: Path) -> tuple[np.ndarray, Callable[[bytes], bytes]]:
    try:
        import lmdb
    except ImportError:
        raise ValueError(f"{place}: a database of LSUN needs the package lmdb: pip install 'dag-depth-guidance[paper]'") from None
    try:
        # Without a lock file: the database may lie where one cannot write, and nobody writes to it.
        database = lmdb.open(str(place), readonly=True, lock=False, readahead=False)
        with database.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))  # already in order
    except lmdb.Error as error:
        raise ValueError(f"{place}: not a whole LMDB database ({error}); export or unpack it again") from None

    def read(key: bytes) -> bytes:
        with database.begin() as transaction:
            return transaction.get(key)

    # As objects: numpy's own byte strings drop zeros at a key's end.
    return np.array(keys, object), read


def _text(key: str | bytes) -> str:
    return key.decode(errors="backslashreplace") if isinstance(key, bytes) else key
