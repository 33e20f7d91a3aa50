"""Results files, and what is made of them.

The page docs/benchmarks.md, its plots, the README's table and the summary of a run on a GPU.
"""
