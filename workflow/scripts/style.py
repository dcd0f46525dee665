"""One look for every figure; importing this module sets it.

Figures are laid out in inches and saved without cropping, so that a tile of 0.8 inch is 160 pixels at 200 dpi and a
picture of 32 pixels is enlarged by exactly 5. The same figure drawn twice gives the same bytes.
"""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers (jfly.uni-koeln.de/color, 2008), without its yellow, too pale for lines.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
DEPTH_COLOURS = "magma"  # far = bright
FLOOR = "constant depth map"
DPI = 200
TILE = 0.8  # inches

matplotlib.rcParams.update(
    {
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same on every machine
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.4,
        "lines.markersize": 5,
        "errorbar.capsize": 2.5,
        "svg.hashsalt": "dag",
        "svg.fonttype": "path",
    }
)


def chart(columns: int, width: float, height: float, rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns panels, each width x height inches, and its axes (rows, columns). Options go to `Figure.subplots`."""
    figure = Figure((columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def tiles(rows: int, columns: int, *, gaps: dict[int, float] | None = None, margins: Sequence[float], pad: float = 0.03) -> tuple[Figure, np.ndarray]:
    """A figure of square tiles without frames and its axes (rows, columns).

    gaps: extra space above a row, in inches. margins: left, right, top, bottom, in inches. All lengths should be multiples of 0.005.
    """
    gaps = gaps or {}
    left, right, top, bottom = margins
    width = left + right + columns * TILE + (columns - 1) * pad
    height = top + bottom + rows * TILE + (rows - 1) * pad + sum(gaps.values())
    figure = Figure((width, height))
    axes = np.empty((rows, columns), object)
    for row in range(rows):
        y = height - top - (row + 1) * TILE - row * pad - sum(gap for at, gap in gaps.items() if at <= row)
        for column in range(columns):
            axes[row, column] = place(figure, left + column * (TILE + pad), y, TILE, TILE)
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
            axes[row, column].grid(False)
    return figure, axes


def place(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the lower left corner."""
    whole_width, whole_height = figure.get_size_inches()
    return figure.add_axes((x / whole_width, y / whole_height, width / whole_width, height / whole_height))


def label_row(axes: np.ndarray, row: int, text: str) -> None:
    """Write the name of a row of tiles to its left."""
    axes[row, 0].text(-0.06, 0.5, text, transform=axes[row, 0].transAxes, ha="right", va="center", fontsize=8.5)


def label_group(axes: np.ndarray, first: int, last: int, text: str, x: float, colour: str = BLACK) -> None:
    """Write the name of rows first..last sideways, x tile widths to their left, with a line along them."""
    figure = axes[first, 0].figure
    above, below = axes[first, 0].get_position(), axes[last, 0].get_position()
    at = above.x0 - x * above.width
    figure.text(at, (above.y1 + below.y0) / 2, text, rotation=90, ha="right", va="center", fontsize=10, fontweight="bold", color=colour)
    line = matplotlib.lines.Line2D([at + 0.05 * above.width] * 2, [below.y0, above.y1], transform=figure.transFigure, color=colour, linewidth=1.5)
    figure.add_artist(line)


def show(axes: Axes, image: np.ndarray, **options):
    """Show a picture with square, unblurred pixels, in svg too ("none": stored as it is; png and browsers take the nearest pixel)."""
    return axes.imshow(image, interpolation="none", aspect="auto", **options)


def floor_last(panel: Axes) -> dict[str, list]:
    """Handles and labels of a legend with the constant depth map, the floor, at its end."""
    handles, labels = panel.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == FLOOR)
    return {"handles": [handles[i] for i in order], "labels": [labels[i] for i in order]}


def depth_limits(*depths: np.ndarray) -> dict[str, float]:
    """vmin and vmax in metres that fit all the given maps but the outermost 1 % of their pixels."""
    values = np.concatenate([np.ravel(depth) for depth in depths])
    low, high = np.percentile(values, [1, 99])
    return {"vmin": float(low), "vmax": float(high)}


def depth_bar(figure: Figure, picture, axes: Axes) -> None:
    """A colour bar of depth in metres in the given axes."""
    bar = figure.colorbar(picture, cax=axes)
    bar.outline.set_visible(False)
    axes.grid(False)
    axes.tick_params(length=2, labelsize=8)
    axes.set_ylabel("depth (m)", fontsize=8.5)


def common_seeds(first: np.ndarray, *others: np.ndarray, count: int) -> list[int]:
    """The first `count` seeds that all runs have, in the order of the first. Raises ValueError when there are fewer."""
    shared = [int(seed) for seed in first if all(seed in other for other in others)]
    if len(shared) < count:
        raise ValueError(f"figures.seeds is {count}, but the runs have {len(shared)} seeds in common")
    return shared[:count]


def save(figure: Figure, png: str, svg: str) -> None:
    """Write both formats, free of dates and versions."""
    figure.savefig(png, dpi=DPI, metadata={"Software": None})
    figure.savefig(svg, dpi=DPI, metadata={"Date": None, "Creator": None})
