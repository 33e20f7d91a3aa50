"""What is known without running anything on a GPU.

Launches and bytes are counted, machine code is read, limits are computed from published rates.
"""
