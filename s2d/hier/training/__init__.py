"""How the hierarchical model is trained and judged. The loop stands in `tools/train_hier_init.py`.

What every training needs (run folder, state, average of the weights, loader) is that of `s2d.fixer.training`.
"""
