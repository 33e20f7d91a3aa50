"""Timing: fastreg next to other ways to write a penalty, on real models.

The peers and their checks, the harness, and a command for each question.
"""
