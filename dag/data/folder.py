"""A folder of pictures, with depth beside them or without.

Pictures are `*.jpg`, `*.jpeg`, `*.png` or `*.webp` in the folder itself, or in its subfolder `rgb` with depths `depth/<same name>.png`: 16-bit grey,
a whole number of units of depth_unit metres along the optical axis, 0 where unknown. A split is a subfolder laid out like that.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dag.data.domain import Dataset

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_DEEP = {"I;16", "I;16B", "I;16L"}  # Pillow's modes of 16-bit grey


def dataset(size: int, split: str | None, root: str, depth_unit: float = 0.001) -> Folder:
    """The domain `folder` (see `dag.data.domain`); size is the studies' own, pictures are scaled by whoever reads them."""
    return Folder(_inside(Path(root), split), depth_unit)


class Folder(Dataset):
    """Pictures in the order of their names; an id is a position in it. depth_unit: metres of one step of a depth picture.

    Raises FileNotFoundError without the folder, ValueError on a folder without pictures or with other depths than pictures.
    """

    def __init__(self, root: str | Path, depth_unit: float = 0.001):
        self.root, self.depth_unit = Path(root), depth_unit
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder of pictures")
        folder = self.root / "rgb" if (self.root / "rgb").is_dir() else self.root
        self.files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES)
        if not self.files:
            raise ValueError(f"{folder}: holds no pictures ({', '.join(sorted(_SUFFIXES))})")
        names = [f.stem for f in self.files]
        if twice := next((a for a, b in zip(names, names[1:], strict=False) if a == b), None):
            raise ValueError(f"{folder}: holds two pictures named {twice!r}, expected one")
        self.depths = folder.parent / "depth" if folder != self.root else None
        if self.depths is not None and self.depths.is_dir():
            match(self.depths, names)
        else:
            self.depths = None

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        """(h, w, 3) uint8, turned upright. Raises ValueError naming a picture that is not readable or not in colour."""
        return read_image(self.files[i])

    def depth(self, i: int) -> np.ndarray | None:
        """(h, w) float32 in metres, 0 where unknown. Raises ValueError naming a picture that is not 16-bit grey of the image's size."""
        if self.depths is None:
            return None
        return read_depth(self.depths / f"{self.files[i].stem}.png", self.depth_unit, image_size(self.files[i]))

    def id(self, i: int) -> int:
        return i

    def name(self, i: int) -> str:
        return str(self.files[i])


def match(depths: Path, names: list[str]) -> None:
    """Raises ValueError unless the folder `depths` has one PNG for each name and no other."""
    found = {f.stem for f in depths.glob("*.png")}
    if odd := sorted(found ^ set(names)):
        raise ValueError(
            f"{depths}: {len(found)} depth maps for {len(names)} pictures; {odd[0]!r} is only among the {'depths' if odd[0] in found else 'pictures'}"
        )


def _inside(root: Path, split: str | None) -> Path:
    if split is not None and (Path(split).name != split or split in (".", "..")):
        raise ValueError(f"{split!r} is no split of {root}: a split is the name of a subfolder")
    return root if split is None else root / split


def _opened(file: Path) -> Image.Image:
    try:
        picture = Image.open(file)
        picture.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such picture") from None
    except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's words for damaged files
        raise ValueError(f"{file}: not a readable picture ({' '.join(str(error).split())[:120]})") from None
    return picture


def read_image(file: Path) -> np.ndarray:
    """(h, w, 3) uint8 of a picture in 8-bit RGB, turned as its EXIF data say.

    Raises ValueError on another kind: what greys, palettes or transparency should look like is for their owner to say.
    """
    picture = _opened(file)
    if picture.mode != "RGB":
        raise ValueError(f"{file}: a picture of mode {picture.mode}, expected RGB, 8 bits a colour; convert it first")
    if picture.format == "PNG" and _png_bits(file) != 8:  # of which Pillow would keep eight and say nothing
        raise ValueError(f"{file}: a picture of {_png_bits(file)} bits a colour, expected RGB, 8 bits a colour; convert it first")
    return np.asarray(ImageOps.exif_transpose(picture))


def _png_bits(file: Path) -> int:
    """Bits a colour, the byte after width and height in the header."""
    with file.open("rb") as png:
        return png.read(25)[24]


@lru_cache(maxsize=8)
def image_size(file: Path) -> tuple[int, int]:
    """(h, w) of a picture when it stands upright, by its header alone."""
    try:
        with Image.open(file) as picture:
            turned = picture.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 lie on their side
            return picture.size if turned else picture.size[::-1]
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file}: not a readable picture ({' '.join(str(error).split())[:120]})") from None


def read_depth(file: Path, unit: float, size: tuple[int, int]) -> np.ndarray:
    """(h, w) float32 in metres of a 16-bit grey PNG in steps of `unit` metres. Raises ValueError on another kind or size (h, w)."""
    picture = _opened(file)
    if picture.mode not in _DEEP:
        raise ValueError(f"{file}: a picture of mode {picture.mode}, expected 16-bit grey")
    if picture.size[::-1] != size:
        raise ValueError(f"{file}: {picture.height} x {picture.width} pixels, expected {size[0]} x {size[1]}, the size of its image")
    return np.asarray(picture).astype(np.float32) * np.float32(unit)
