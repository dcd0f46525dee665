"""Guide a diffusion model of your own: heads from image and depth pairs, a prior from depth maps, the same seeds without and with guidance.

python examples/guide_your_own.py [MODEL [FOLDER]]: MODEL is any folder of an unconditional pixel-space model that diffusers saves, by default the
shipped one; FOLDER gets the guided pipeline and guided.png: image and depth, two rows unguided, two rows guided. Under a minute on one core.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

from dag import DepthAwareGuidancePipeline, DepthCoding, Recipe, train_heads, train_prior
from dag.data.rooms import render

# %% Your pictures and their depth: (n, s, s, 3) uint8 at the model's size and (n, s, s) metres, NaN where unknown.
model, folder = [*sys.argv[1:], "models/rooms32", "guided"][:2] if len(sys.argv) != 2 else (sys.argv[1], "guided")
images, depth, _ = render(range(1_000_000, 1_000_100), 32)
coding = DepthCoding(near=0.5, far=10.0)

# %% Heads that read depth out of the frozen U-Net, and a prior over depth maps at half the size.
pipe = DepthAwareGuidancePipeline.from_pretrained(model)
heads = train_heads(pipe.predictor, images, depth, coding, recipe=Recipe(steps=80, batch_size=16, learning_rate=2e-3, ema=0.98))
prior = train_prior(depth, coding, resolution=16, recipe=Recipe(steps=60, batch_size=32, ema=0.98))
pipe.register_modules(heads=heads, prior=prior)
pipe.save_pretrained(folder)  # DepthAwareGuidancePipeline.from_pretrained(folder) reads it again


# %% The same noise without and with guidance.
def rows(**guidance):
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    drawn = pipe(8, generators, num_inference_steps=25, output_type="np", output_depth=True, **guidance)
    return [np.hstack(drawn.images), np.hstack(plt.cm.magma(drawn.depth / coding.far)[..., :3])]


plt.imsave(f"{folder}/guided.png", np.vstack([*rows(), *rows(w_dc=100.0, w_dp=30.0)]).repeat(3, 0).repeat(3, 1))
