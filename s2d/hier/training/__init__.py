"""What the hierarchical model is trained on and judged by. The loop stands in `tools/train_hier_init.py`; what every training needs, in `s2d.runs`."""
