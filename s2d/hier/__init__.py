"""Hierarchical feed-forward Gaussians, after HiSplat: a few posed pictures in, Gaussians of three levels out, without optimisation.

`views` and `gaussians` are what goes in and out, `model` is the network, `analytic` does without one. How it works: docs/hier.md.
"""
