"""LapisGS-style layers: Gaussians trained from coarse pictures to fine ones, where each layer adds to a frozen foundation.

`levels` and `records` are the format on disk; the other modules train, pack and measure. How it works: docs/layers.md.
"""
