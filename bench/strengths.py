"""The strengths and the step that every method is measured and checked with.

Large enough that a method which forgets a term or does not shrink fails its check even in bfloat16; costs do not depend
on them.
"""

L1 = 0.5
L2 = 5.0
LR = 1e-2
