"""Timing: fastreg next to other ways to write a penalty; the peers, the harness, a command for each question."""
