"""Training pairs for the fixer, made by our own stages 0 and 1: renders with artifacts, and the photos they should look like.

`plan` lists the fits, `jobs` does them, `dataset` owns the folder (format: docs/data_formats.md), `workers` spreads jobs over processes;
`tools/make_fixer_pairs.py` is the command.
"""
