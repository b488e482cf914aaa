"""Stage 2's fixers: each turns (artifact render, point guidance, reference photo) into a clean pseudo view.

`interface` says what stage 2 asks of a fixer; every other module is one fixer.
"""
