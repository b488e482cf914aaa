"""How fixers are trained: paired images in, weights for stage 2 out. The loop itself stands in `train_artifact_fixer.py`.

Images are [B,3,H,W] in [-1,1]. A, B, P are the folders of the data set: A renders with artifacts, B what they should look
like, P the point guidance. Everything random is a function of the seed and a counter (which step, which sample), so a run that
was interrupted, or is spread over other processes, sees the same numbers without any state being saved.
"""
