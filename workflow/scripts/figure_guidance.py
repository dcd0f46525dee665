"""Fig. 5: samples, their depth and their surface normals, unguided above guided, from the same seeds."""

import numpy as np
import style
from matplotlib.figure import Figure

from dag.data.geometry import camera, normals_from_depth
from dag.stages.arrays import picked

Run = tuple[np.ndarray, np.ndarray]  # images uint8 (k, s, s, 3), depth (k, s, s) in metres


def draw(unguided: Run, guided: Run, fov_degrees: float) -> Figure:
    """Each run: images and judged depth of the same k seeds. fov_degrees: field of view that the normals assume."""
    seeds, size = unguided[1].shape[:2]
    intrinsics = camera(np.array([np.tan(np.radians(fov_degrees / 2))]), size)[0]
    figure, axes = style.tiles(6, seeds, gaps={3: 0.14}, margins=(1.1, 0.85, 0.1, 0.1))
    limits = style.depth_limits(unguided[1], guided[1])
    for first, name, colour, (images, depth) in ((0, "unguided", style.GREY, unguided), (3, "guided", style.BLUE, guided)):
        for column in range(seeds):
            style.show(axes[first, column], images[column])
            picture = style.show(axes[first + 1, column], depth[column], cmap=style.DEPTH_COLOURS, **limits)
            style.show(axes[first + 2, column], normal_colours(normals_from_depth(depth[column], intrinsics)))
        for row, label in enumerate(("image", "depth", "normals")):
            style.label_row(axes, first + row, label)
        style.label_group(axes, first, first + 2, name, 0.82, colour)
    width, height = figure.get_size_inches()
    style.depth_bar(figure, picture, style.place(figure, width - 0.75, height - 0.1 - 3 * style.TILE - 0.06, 0.12, 3 * style.TILE + 0.06))
    _normal_key(figure, width - 0.75, 0.1)
    return figure


def normal_colours(normals: np.ndarray) -> np.ndarray:
    """Red: towards the right, green: upwards, blue: towards the camera; each from -1 (none) to 1 (full)."""
    return (normals * [1, 1, -1] + 1) / 2


def _normal_key(figure: Figure, x: float, y: float) -> None:
    """The half sphere of visible normals, as the key to their colours."""
    side, pixels = 0.6, 120
    right, down = np.meshgrid(*[(np.arange(pixels) + 0.5) / pixels * 2 - 1] * 2)
    squared = right**2 + down**2
    ball = normal_colours(np.stack([right, -down, -np.sqrt(np.maximum(1 - squared, 0))], -1))
    panel = style.place(figure, x, y + 0.18, side, side)
    panel.imshow(np.concatenate([ball, (squared < 1)[..., None]], -1), interpolation="none")
    panel.axis("off")
    figure.text((x + side / 2) / figure.get_figwidth(), (y + 0.08) / figure.get_figheight(), "normals", ha="center", va="center", fontsize=8.5)


def _chosen(samples: str, judged: str, seeds: list[int]) -> Run:
    with np.load(samples) as images, np.load(judged) as depths:
        at = [list(images["seeds"]).index(seed) for seed in seeds]
        depth_at = [list(depths["seeds"]).index(seed) for seed in seeds]
    return picked(samples, "images", at), picked(judged, "judged", depth_at)


def load(files, count: int) -> tuple[Run, Run]:
    """Images and judged depth of the first `count` seeds that the runs unguided and guided share."""
    with np.load(files.unguided) as unguided, np.load(files.guided) as guided:
        seeds = style.common_seeds(unguided["seeds"], guided["seeds"], count=count)
    return _chosen(files.unguided, files.unguided_depth, seeds), _chosen(files.guided, files.guided_depth, seeds)


if job := globals().get("snakemake"):  # set by the rule's `script:`
    style.save(draw(*load(job.input, job.params.seeds), job.params.fov_degrees), **job.output)
