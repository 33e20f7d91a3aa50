"""Benchmarks of fastreg: measure/ times, static/ counts and reads machine code, report/ writes pages and plots.

`pytest bench --benchmark-only` asks the questions of bench/test_questions.py, `bench.run_on_gpu` all of a GPU.
"""
