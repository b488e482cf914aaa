"""Cameras from photos alone: structure from motion for few views. How it works: docs/poses.md."""
