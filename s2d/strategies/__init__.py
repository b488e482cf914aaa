"""What sparse views need beyond plain 3DGS: one file per strategy, all off by default, switched by `settings.Strategy`.

`active.ActiveStrategies` is what `s2d.training` calls; the other files are functions of tensors and know neither runs nor stages.
"""
