"""SGD, Adam and AdamW with the penalty inside: one sweep makes the whole step.

    >>> optimizer = fastreg.optim.AdamW(model.parameters(), lr=1e-3, l1=1e-5, prox=True)
    >>> criterion(model(x), y).backward()
    >>> optimizer.step()

The penalty l1 * Σ|w| + l2 * Σw² of each parameter group is part of the step in one of two ways.

prox=False: its gradient l1 * sign(w) + 2 * l2 * w is added to that of the data before everything else, as if the
penalty were part of the loss. `.grad` itself is left as it is.

prox=True: only the data's gradient goes through the moments. After the step each weight makes a proximal step,
w = sign(w) * max(|w| - t * l1, 0) / (1 + 2 * t * l2), which leaves exact zeros. t is the step per unit of a gradient
that has settled:

    SGD                  t = lr * f,  f = 1
    with momentum m      f = (1 - dampening) / (1 - m)
    Nesterov's           f = 1 + m * (1 - dampening) / (1 - m)
    Adam, AdamW          t = lr / (sqrt(v / (1 - beta2^step)) + eps)

elementwise, with v the second moment after the step, so that training ends where the penalised problem has its minimum,
whatever the optimizer. Source: J. Yun, A. C. Lozano, E. Yang, "Adaptive proximal gradient methods for structured neural
networks", 2021.

Under Adam the proximal step moves no element further than lr * max(2, (1 - beta1) / sqrt(1 - beta2)), the longest step
that Adam itself can make, and at least 2 * lr (D. P. Kingma, J. Ba, "Adam", 2015, section 2.1). The bound matters where
v is 0 or nearly so: there t is lr / eps, and would make zeros of weights that the data has not reached yet. The first
step leaves elements with v = 0 alone.
"""

from fastreg.optim.adam import Adam, AdamW
from fastreg.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]


SGD.__module__ = Adam.__module__ = AdamW.__module__ = __name__  # by which pickles find them
