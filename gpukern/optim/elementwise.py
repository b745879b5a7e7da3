"""The optimizers' rules a tensor at a time, as CuPy's own kind of kernel: to read, to teach, to try."""

from __future__ import annotations

from typing import Any

from gpukern.optim._fused import rules
from gpukern.optim._fused.codegen import elementwise

#: By the name of the class.
_RULES = {
    **{"SGD": rules.SGD, "Adagrad": rules.ADAGRAD, "RMSprop": rules.RMSPROP, "Adam": rules.ADAM},
    **{"AdamW": rules.ADAM, "Lion": rules.LION, "LARS": rules.LARS, "LAMB": rules.LAMB},
}


def elementwise_kernel(name: str) -> Any:
    """The update of ``gpukern.optim``'s class ``name`` as a ``cupy.ElementwiseKernel`` of float32 arrays.

    It is called with the gradient, every hyperparameter and ``step``, the number of this update from 1, as numbers, and
    then with the parameter and the states, which it changes::

        adam = gpukern.optim.elementwise_kernel("Adam")
        adam(g, lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled, step, p, exp_avg, exp_avg_sq, maxima)

    AdamW's kernel is Adam's, called with ``decoupled`` = 1. The text of the update is the one that
    :class:`~gpukern.optim.Optimizer` launches for all tensors at once. ValueError for an unknown name, and for LARS and
    LAMB, which need norms of whole tensors first; ImportError without CuPy.
    """
    if name not in _RULES:
        known = [each for each, rule in _RULES.items() if not rule.norms]
        raise ValueError(f"unknown optimizer {name!r}, expected one of {', '.join(known)}")
    texts = elementwise(_RULES[name])
    import cupy

    return cupy.ElementwiseKernel(*texts, name=f"{name.lower()}_elementwise_kernel")
