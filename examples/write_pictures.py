"""Twenty pictures with depth as a camera would leave them, for docs/own-data.md: drawn rooms, 96 x 72, JPEG and 16-bit PNG in millimetres.

python examples/write_pictures.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dag.data.rooms import render

folder = Path(sys.argv[1])
images, depth, _ = render(range(2_000_000, 2_000_020), 96)
images, millimetres = images[:, 12:84], np.round(depth[:, 12:84] * 1000).astype(np.uint16)
millimetres[:, :2, :2] = 0  # what the camera did not see
for name in ("rgb", "depth"):
    (folder / name).mkdir(parents=True, exist_ok=True)
for number, (image, depth_map) in enumerate(zip(images, millimetres, strict=True)):
    Image.fromarray(image).save(folder / "rgb" / f"room{number:02}.jpg", quality=95)
    Image.fromarray(depth_map).save(folder / "depth" / f"room{number:02}.png")
