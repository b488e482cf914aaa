"""Random 3D scenes with photos and exact cameras: more scenes for the fixer to learn from than there are real ones.

`shapes` are what rays hit, `textures` what is on them, `things` are made of shapes, `rigs` are ways of taking photos, `layouts` put a
scene together, `light` bakes its shadows, `photograph` makes the pictures and `files` writes a scene; `tools/make_synthetic_scenes.py`
is the command. Lengths are metres, world axes have z up, cameras are as everywhere (OpenCV axes, pixel centres at +0.5).
"""
