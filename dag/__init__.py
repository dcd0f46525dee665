"""Depth-aware guidance for diffusion models: an open implementation of DAG (Kim et al. 2022, arXiv 2212.08861)."""

__version__ = "0.1.0"
