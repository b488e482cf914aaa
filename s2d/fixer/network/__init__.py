"""The networks of the diffusion fixer and their files: the one place that needs diffusers, peft and transformers.

Importing anything here takes seconds (those packages are large), so the rest of `s2d` imports it inside the functions that
use it. Inside: images are [B,3,H,W] in [-1,1], B batch, V views of one sample (view 0 is the one to fix, the others are
references), c latent channels, h, w latent size.
"""
