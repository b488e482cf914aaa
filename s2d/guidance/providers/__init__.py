"""Visual geometry models as sources of the point guidance: photos, with or without cameras -> cameras, depth, points, confidence.

`load.load_provider` makes one by name, `placement.cloud_in_scene` brings what it saw into the scene's frame. One file per model holds
everything that is particular to it: package, weights, sizes, axes, half pixels. What is known of each: docs/providers.md.
"""
