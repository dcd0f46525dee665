"""What a study takes its pictures from: one contract for drawn scenes and datasets, chosen by the config's `domain.name`.

A module of `dag.data` becomes a domain by a line in DOMAINS and a function `dataset(size=..., split=..., **options)` that returns
a Dataset. Modules are imported when they are asked for: what one of them needs, a study of another does not.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Kind:
    """module: of dag.data. options: keys of the config's `domain` besides name and size, the needed ones first. needed: how many are.
    splits: how many pictures its splits have, by name, where they are always the same. mixed: ranges of pictures are taken from one fixed random order,
    since neighbours are photographs of the same place.

    drawn: pictures are drawn from numbers, as many as one likes, so that no two uses need to share one; else they lie in files, in a
    few splits, and what trains a network must not be what the network is measured on.
    """

    module: str
    options: tuple[str, ...] = ()
    needed: int = 0
    drawn: bool = False
    splits: Mapping[str, int] = field(default_factory=dict)
    mixed: bool = False


DOMAINS = {
    "rooms": Kind("rooms", drawn=True),
    "streets": Kind("streets", drawn=True),
    "folder": Kind("folder", ("root", "depth_unit"), needed=1),
    "nyu": Kind("nyu", ("root",), splits={"train": 795, "test": 654}, mixed=True),
    "lsun": Kind("lsun", ("root", "order", "resample", "corrupt"), needed=1),
}

# Uses of pictures files that must not share any: what is measured, and what learns from pictures.
_APART = {
    "validation": ("labels",),
    "heldout": ("unet", "labels", "prior", "judge", "reference"),
    "test": ("unet", "labels", "prior", "judge", "reference", "downstream"),
}


class Pictures(NamedTuple):
    """n pictures of one size. depth is None where the dataset has none; valid is None where every depth is known.

    Unknown depths are filled with the nearest known one, so that networks can learn from whole maps; measurements leave them out.
    """

    images: np.ndarray  # (n, s, s, 3) uint8
    depth: np.ndarray | None  # (n, s, s) float32, metres along the optical axis
    valid: np.ndarray | None  # (n, s, s) bool
    ids: np.ndarray  # (n,) int64


class Dataset(ABC):
    """Pictures by position, 0 to len - 1, each of its own size. part: the rows and columns that show something, of which squares are made.

    unreadable: pictures that `squares` left out, by name, with the reason.
    """

    part: tuple[slice, slice] = (slice(None), slice(None))
    unreadable: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, i: int) -> np.ndarray:
        """(h, w, 3) uint8."""

    @abstractmethod
    def depth(self, i: int) -> np.ndarray | None:
        """(h, w) float32, metres along the optical axis, 0 where it is unknown; None where the dataset has no depth."""

    @abstractmethod
    def id(self, i: int) -> int:
        """What names the picture in tables and seeds its random numbers."""

    def name(self, i: int) -> str:
        """What an error calls the picture."""
        return f"picture {self.id(i)}"

    def squares(self, index: np.ndarray, size: int) -> Pictures:
        """The pictures at some positions as squares: the short side scaled to size, then the centre.

        Raises ValueError naming a picture that cannot be read or whose depth is unknown everywhere.
        """
        from dag.data.squares import centre, scaled, scaled_depth

        images, depths, valid = np.empty((len(index), size, size, 3), np.uint8), [], np.ones((len(index), size, size), bool)
        for row, i in enumerate(map(int, index)):
            image, depth = self.image(i)[self.part], self.depth(i)
            images[row] = scaled(image, size, centre(image.shape))
            if depth is not None:
                try:
                    square, valid[row] = scaled_depth(depth[self.part], size, centre(image.shape))
                except ValueError as error:
                    raise ValueError(f"{self.name(i)}: {error}") from None
                depths.append(square)
        ids = np.array([self.id(int(i)) for i in index], np.int64)
        return Pictures(images, np.stack(depths) if depths else None, None if valid.all() else valid, ids)


class Drawn(Dataset):
    """Scenes of size x size pixels by their seed, any whole number from 0.

    render(seeds, size) gives images, depths in metres, normals and, where some depth is unknown, which of it is known.
    """

    def __init__(self, render: Callable[[np.ndarray, int], tuple[np.ndarray, ...]], size: int):
        self.render, self.size = render, size

    def __len__(self) -> int:
        return 2**63 - 1

    def image(self, i: int) -> np.ndarray:
        return self.squares(np.array([i]), self.size).images[0]

    def depth(self, i: int) -> np.ndarray:
        return self.squares(np.array([i]), self.size).depth[0]

    def id(self, i: int) -> int:
        return i

    def squares(self, index: np.ndarray, size: int) -> Pictures:
        """The scenes of some seeds, drawn at this size rather than scaled to it."""
        images, depth, _, *known = self.render(index, size)
        return Pictures(images, depth, known[0] if known else None, np.asarray(index, np.int64))


@dataclass(frozen=True)
class Use:
    """Which pictures one use of the config's `data` section takes. split: None for the whole dataset; count: None for all from first on."""

    split: str | None
    first: int = 0
    count: int | None = None

    @classmethod
    def parse(cls, value) -> Use:
        """A split's name, [first, count] or [split, first, count]. Raises ValueError on anything else."""
        if isinstance(value, str):
            return cls(value)
        split, numbers = (value[0], value[1:]) if isinstance(value[0], str) else (None, value)
        if len(numbers) != 2 or not all(type(n) is int for n in numbers) or numbers[0] < 0 or numbers[1] < 1:
            raise ValueError(f"{value!r}, expected a split, [first, count] or [split, first, count] with first from 0 and count from 1")
        return cls(split, *numbers)

    def shares(self, other: Use) -> bool:
        """Whether the two may have a picture in common: splits of a dataset have none, a split and the whole dataset may."""
        if None not in (self.split, other.split) and self.split != other.split:
            return False
        if self.split != other.split:
            return True
        first, second = sorted((self, other), key=lambda use: use.first)
        return first.count is None or second.first < first.first + first.count

    def index(self, available: int) -> np.ndarray:
        """Positions in a dataset of so many pictures. Raises ValueError where it has fewer."""
        count = available - self.first if self.count is None else self.count
        if count < 1 or self.first + count > available:
            where = "the dataset" if self.split is None else f"split {self.split!r}"
            raise ValueError(f"pictures {self.first} to {self.first + max(count, 1) - 1} are asked for; {where} has {available}")
        return np.arange(self.first, self.first + count)


def check(domain: dict, data: dict, elsewhere: Mapping[str, dict] = MappingProxyType({})) -> dict[str, Use]:
    """The uses of a config's `data`, by name, after checking them and the `domain` section. Raises ValueError that starts with the key.

    elsewhere: {use: section like `domain`} of uses whose pictures come from another domain.
    """
    for key, place in {"domain": domain, **{f"domain of data.{name}": place for name, place in elsewhere.items()}}.items():
        _check_options(key, place)
    uses = {}
    for name, value in data.items():
        place = elsewhere.get(name, domain)
        kind = DOMAINS[place["name"]]
        try:
            uses[name] = Use.parse(value)
        except ValueError as error:
            raise ValueError(f"data.{name} is {error}") from None
        if kind.drawn and (uses[name].split is not None or uses[name].count is None):
            raise ValueError(f"data.{name} is {value!r}, but the domain {place['name']!r} has no splits, expected [first seed, count]")
        if kind.splits and uses[name].split not in (None, *kind.splits):
            raise ValueError(f"data.{name} is {value!r}; the splits of the domain {place['name']!r} are {', '.join(kind.splits)}")
    here = {name: use for name, use in uses.items() if name not in elsewhere}
    (_check_seeds if DOMAINS[domain["name"]].drawn else _check_apart)(here)
    return uses


def _check_options(key: str, domain: dict) -> None:
    kind = DOMAINS[domain["name"]]
    for option in sorted(domain.keys() - {"name", "size"} - set(kind.options)):
        raise ValueError(f"{key}.{option} is set, but the domain {domain['name']!r} takes {', '.join(kind.options) or 'only a size'}")
    for option in kind.options[: kind.needed]:
        if option not in domain:
            raise ValueError(f"{key}.{option} is missing; the domain {domain['name']!r} needs it")


def _check_seeds(uses: dict[str, Use]) -> None:
    spans = sorted((use.first, use.first + use.count, name) for name, use in uses.items())
    for (_, end, name), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise ValueError(f"data.{other} starts at seed {start}, inside data.{name}, which ends at {end}; uses must not share seeds")


def _check_apart(uses: dict[str, Use]) -> None:
    for measured, learnt in _APART.items():
        for name in learnt:
            if {measured, name} <= uses.keys() and uses[measured].shares(uses[name]):
                raise ValueError(f"data.{measured} may share pictures with data.{name}; what is measured must be new to what was trained")


def dataset(domain: dict, split: str | None) -> Dataset:
    """The dataset of a config's `domain` section, or one split of it."""
    kind = DOMAINS[domain["name"]]
    module = importlib.import_module(f"dag.data.{kind.module}")
    options = {key: value for key, value in domain.items() if key in kind.options}
    return module.dataset(size=domain["size"], split=split, **options)
