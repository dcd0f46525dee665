"""Depth-aware guidance for diffusion models: an open implementation of DAG (Kim et al. 2022, arXiv 2212.08861).

`from dag import ...` offers what guiding a model of one's own needs. A name is imported when it is first asked for: `import dag` costs nothing.
"""

__version__ = "0.1.0"

# Where each public name lives.
_HOMES = {
    "dag.data.depth": ("DepthCoding",),
    "dag.data.folder": ("Folder",),
    "dag.diffusion": ("Diffusion", "respace"),
    "dag.guidance": ("Consistency", "DepthGuidance", "Prior", "Term", "UNetPredictor"),
    "dag.metrics.depth_errors": ("DepthProtocol", "depth_errors"),
    "dag.metrics.distances": ("frechet_distance", "moments", "paired_bootstrap"),
    "dag.metrics.extractors": ("load_extractor",),
    "dag.networks": ("DepthHeads", "DepthPrior", "train_heads", "train_prior"),
    "dag.pipeline": ("DepthAwareGuidancePipeline",),
    "dag.sampling": ("SampleRNG", "sample_ddim", "sample_ddpm"),
    "dag.training": ("Recipe",),
    "dag.weights": ("load_unet",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dag' has no attribute {name!r}; it offers {', '.join(sorted(_HOME))}")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
