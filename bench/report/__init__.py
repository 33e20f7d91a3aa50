"""Results files, and what is made of them: docs/benchmarks.md, its plots, the README's table, a verdict on a GPU."""
