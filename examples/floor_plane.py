"""A guidance term of your own: the floor is flat.

python examples/floor_plane.py [FOLDER] after examples/guide_your_own.py, whose pipeline FOLDER holds. Prints how far the depth of the lowest rows
is from a plane, without and with the term.
"""

import sys

import torch
from torch import Tensor

from dag import DepthAwareGuidancePipeline, DepthCoding


class FloorPlane:
    """Draws the depth of the picture's lowest rows to one plane, whichever fits best.

    Seen by a pinhole camera, the inverse depth of a plane is linear in the pixel's row and column. What a least-squares fit leaves of it, relative
    to its mean, is the loss. Whoever writes a term writes this much: a name, a weight, the heads it reads, and one loss per sample.
    """

    name, heads = "floor", ("strong",)

    def __init__(self, weight: float, coding: DepthCoding, share: float = 0.25):
        self.weight, self.coding, self.share = weight, coding, share

    def __call__(self, depths: dict[str, Tensor], t: Tensor, rng) -> Tensor:
        metres = self.coding.decode(depths["strong"])[:, 0]
        rows = round(metres.shape[1] * self.share)
        inverse = 1 / metres[:, -rows:].flatten(1)
        grid = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, metres.shape[2]), indexing="ij")
        basis = torch.stack([torch.ones(inverse.shape[1]), *(axis.flatten() for axis in grid)], 1)
        onto_planes = (basis @ torch.linalg.pinv(basis)).to(inverse)
        return ((inverse - inverse @ onto_planes) / inverse.mean(1, keepdim=True)).square().mean(1)


if __name__ == "__main__":
    pipe = DepthAwareGuidancePipeline.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "guided")
    term = FloorPlane(weight=3000.0, coding=pipe.heads.depth_coding)
    for label, terms in (("unguided", []), ("guided", [term])):
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        drawn = pipe(8, generators, num_inference_steps=25, terms=terms, output_depth=True)
        coded = pipe.heads.depth_coding.encode(torch.from_numpy(drawn.depth))[:, None]
        print(f"{label}: {float(term({'strong': coded}, None, None).mean().sqrt()):.4f} of the mean inverse depth")
