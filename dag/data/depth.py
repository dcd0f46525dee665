"""How metres become the network's depth: a fixed, invertible coding into [-1, 1], the same for heads, prior and judge."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CODINGS = ("log", "linear", "disparity")


@dataclass(frozen=True)
class DepthCoding:
    """Maps depth in metres between near and far onto [-1, 1], near to -1.

    coding: "log" (equal ratios are equal steps), "linear" (equal metres) or "disparity" (equal steps of 1 / depth).
    """

    near: float
    far: float
    coding: str = "log"

    def __post_init__(self):
        if self.coding not in CODINGS:
            raise ValueError(f"depth.coding is {self.coding!r}, expected one of {CODINGS}")
        if not 0 < self.near < self.far < math.inf:
            raise ValueError(f"depth.near is {self.near} and depth.far is {self.far}, expected finite 0 < near < far (metres)")

    def encode(self, metres: Tensor) -> Tensor:
        """Coded depth of the same shape; depths outside near..far are clamped, so a 0 that stands for "unknown" becomes near: mask it before."""
        metres = metres.clamp(self.near, self.far)
        if self.coding == "log":
            return (metres / self.near).log() * (2 / math.log(self.far / self.near)) - 1
        if self.coding == "linear":
            return (metres - self.near) * (2 / (self.far - self.near)) - 1
        return (1 / self.near - 1 / metres) * (2 / (1 / self.near - 1 / self.far)) - 1

    def decode(self, coded: Tensor) -> Tensor:
        """Metres of the same shape; the inverse of encode, clamped to near..far."""
        share = (coded.clamp(-1, 1) + 1) / 2
        if self.coding == "log":
            metres = self.near * (share * math.log(self.far / self.near)).exp()
        elif self.coding == "linear":
            metres = self.near + share * (self.far - self.near)
        else:
            metres = 1 / (1 / self.near - share * (1 / self.near - 1 / self.far))
        # The ends are only near and far up to rounding.
        return metres.clamp(self.near, self.far)

    def mean(self, metres: np.ndarray) -> np.ndarray:
        """The mean (h, w) of depth maps (n, h, w) as networks that learn this code see them: of "log" the geometric mean."""
        return self.decode(self.encode(torch.from_numpy(metres)).mean(0)).numpy()
