"""Benchmarks of fastreg: measure/ times, static/ counts and reads machine code, report/ writes pages and plots."""
