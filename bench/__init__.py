"""Measurements, one file per question, and what the compiler makes of the kernels."""
