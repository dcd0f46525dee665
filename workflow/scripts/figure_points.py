"""Fig. 6: the samples as point clouds, unguided beside guided, seen from above the camera."""

import numpy as np
import style
from figure_guidance import Run, load
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d import Axes3D
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from dag.data.geometry import camera, unproject

_WIDE, _HIGH = 2.6, 2.0  # inches of one cloud


def draw(unguided: Run, guided: Run, fov_degrees: float) -> Figure:
    """Each run: images and judged depth of the same k seeds; one row per seed. fov_degrees: field of view that the points assume."""
    seeds, size = unguided[1].shape[:2]
    intrinsics = camera(np.array([np.tan(np.radians(fov_degrees / 2))]), size)[0]
    left, top = 0.1, 0.35
    figure = Figure((2 * left + 2 * (style.TILE + _WIDE), seeds * _HIGH + top))
    width, height = figure.get_size_inches()
    for side, (name, colour, (images, depth)) in enumerate((("unguided", style.GREY, unguided), ("guided", style.BLUE, guided))):
        x = left + side * (style.TILE + _WIDE)
        figure.text((x + (style.TILE + _WIDE) / 2) / width, 1 - 0.18 / height, name, ha="center", va="center", fontsize=10, fontweight="bold", color=colour)
        for row in range(seeds):
            y = height - top - (row + 1) * _HIGH
            picture = style.place(figure, x, y + (_HIGH - style.TILE) / 2, style.TILE, style.TILE)
            style.show(picture, images[row])
            picture.axis("off")
            _cloud(figure, (x + style.TILE, y), *facets(depth[row], images[row], intrinsics))
    return figure


def facets(depth: np.ndarray, image: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners (n, 4, 3) in metres and colours (n, 3) in 0..1 of every pixel as a small plane.

    Inverse depth is linear in the picture on a plane, so a pixel is extended by the slopes it has in common with its
    neighbours: walls close up, and nothing is drawn across the edge of an object.
    """
    inverse = 1 / depth.astype(float)
    down, right = _slope(inverse, 0), _slope(inverse, 1)
    corners = []
    for dv, du in ((-0.5, -0.5), (-0.5, 0.5), (0.5, 0.5), (0.5, -0.5)):
        shifted = intrinsics - [[0, 0, du], [0, 0, dv], [0, 0, 0]]
        # A pixel at the border has its slope from one neighbour only, which may be too steep to follow.
        corners.append(unproject(1 / np.maximum(inverse + dv * down + du * right, inverse / 2), shifted))
    return np.stack(corners, 2).reshape(-1, 4, 3), image.reshape(-1, 3) / 255


def _slope(values: np.ndarray, axis: int) -> np.ndarray:
    """Change per pixel: the smaller of the differences to both neighbours, zero where they point opposite ways."""
    step = np.diff(values, axis=axis)
    first, last = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
    first[axis], last[axis] = (1, 0), (0, 1)
    before, after = np.pad(step, first, mode="edge"), np.pad(step, last, mode="edge")
    return np.where(before * after > 0, np.where(np.abs(before) < np.abs(after), before, after), 0)


def _cloud(figure: Figure, corner: tuple[float, float], corners: np.ndarray, colours: np.ndarray) -> None:
    """Draw the facets with room axes: x to the right, y into the picture, z up."""
    width, height = figure.get_size_inches()
    panel = Axes3D(figure, (corner[0] / width, corner[1] / height, _WIDE / width, _HIGH / height))
    figure.add_axes(panel)
    drawn = corners[..., [0, 2, 1]]
    surface = Poly3DCollection(drawn, facecolors=colours, edgecolors=colours, linewidths=0.3, rasterized=True)
    panel.add_collection3d(surface)
    surface.set_clip_on(False)
    low, high = drawn.min((0, 1)), drawn.max((0, 1))
    panel.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    panel.set_box_aspect(high - low, zoom=1.3)
    panel.view_init(elev=28, azim=-68)
    panel.set_proj_type("persp", focal_length=0.7)
    panel.axis("off")


if job := globals().get("snakemake"):  # set by the rule's `script:`
    style.save(draw(*load(job.input, job.params.seeds), job.params.fov_degrees), **job.output)
