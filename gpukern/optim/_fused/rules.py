"""The arithmetic of each optimizer, written once in CUDA C++: for the multi-tensor kernel and the elementwise one.

A rule is text over names. ``scalars`` are computed once a block, in fp64, of the group's hyperparameters and ``step``,
the number of updates with this one; ``update`` is what one element does, in fp32, to ``p``, ``g`` and the states. Only
what is a name of the rule may be used, so that the same text serves every way of running it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class State:
    """A tensor beside each parameter. ``when``: the hyperparameter without which it is not kept; "" for always."""

    name: str
    when: str = ""


@dataclass(frozen=True)
class Scalar:
    """A number that all elements of a tensor share: its name, and its expression in fp64."""

    name: str
    value: str


@dataclass(frozen=True, eq=False)
class Rule:
    """An optimizer's rule, equal only to itself: caches use it as a key.

    ``norms``: the two quantities whose norms over the tensor ``update`` needs as ``first_norm`` and ``second_norm``, as
    text that sets ``first`` and ``second``; "" where it needs none.
    """

    name: str
    hyperparameters: tuple[str, ...]
    states: tuple[State, ...]
    scalars: tuple[Scalar, ...]
    update: str
    norms: str = ""


_SIGN = Scalar("sign", "maximize != 0 ? -1 : 1")

#: L2 regularization, as torch adds it. Not for a decay of 0: 0 · ∞ would be NaN.
_DECAY = """
g *= sign;
if (decay != 0.f) g = fmaf(decay, p, g);
"""

SGD = Rule(
    name="sgd",
    hyperparameters=("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    states=(State("momentum_buffer", when="momentum"),),
    scalars=(
        _SIGN,
        Scalar("decay", "weight_decay"),
        Scalar("rate", "lr"),
        Scalar("mu", "momentum"),
        # The first gradient is taken undamped.
        Scalar("taken", "step == 1 ? 1 : 1 - dampening"),
        Scalar("kept", "step == 1 ? 0 : momentum"),
        Scalar("ahead", "nesterov"),
    ),
    update=_DECAY
    + """
if (mu != 0.f) {
    momentum_buffer = kept != 0.f ? fmaf(kept, momentum_buffer, taken * g) : taken * g;
    g = ahead != 0.f ? fmaf(mu, momentum_buffer, g) : momentum_buffer;
}
p = fmaf(-rate, g, p);
""",
)

ADAGRAD = Rule(
    name="adagrad",
    hyperparameters=("lr", "lr_decay", "weight_decay", "eps", "maximize"),
    states=(State("sum"),),
    scalars=(
        _SIGN,
        Scalar("decay", "weight_decay"),
        Scalar("rate", "lr / (1 + (step - 1) * lr_decay)"),
        Scalar("epsilon", "eps"),
    ),
    update=_DECAY
    + """
sum = fmaf(g, g, sum);
p = fmaf(-rate, g / (sqrtf(sum) + epsilon), p);
""",
)

RMSPROP = Rule(
    name="rmsprop",
    hyperparameters=("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"),
    states=(State("square_avg"), State("momentum_buffer", when="momentum"), State("grad_avg", when="centered")),
    scalars=(
        _SIGN,
        Scalar("decay", "weight_decay"),
        Scalar("rate", "lr"),
        Scalar("smoothing", "alpha"),
        Scalar("taken", "1 - alpha"),
        Scalar("epsilon", "eps"),
        Scalar("mu", "momentum"),
        Scalar("around_mean", "centered"),
    ),
    update=_DECAY
    + """
square_avg = fmaf(smoothing, square_avg, taken * g * g);
float variance = square_avg;
if (around_mean != 0.f) {
    grad_avg = fmaf(taken, g - grad_avg, grad_avg);
    variance = fmaf(-grad_avg, grad_avg, square_avg);
}
float direction = g / (sqrtf(variance) + epsilon);
if (mu != 0.f) {
    momentum_buffer = fmaf(mu, momentum_buffer, direction);
    direction = momentum_buffer;
}
p = fmaf(-rate, direction, p);
""",
)

_MOMENTS = """
exp_avg = fmaf(taken1, g - exp_avg, exp_avg);
exp_avg_sq = fmaf(smoothing2, exp_avg_sq, taken2 * g * g);
"""
_ADAM_SCALARS = (
    _SIGN,
    Scalar("decay", "decoupled != 0 ? 0 : weight_decay"),
    Scalar("shrink", "decoupled != 0 ? 1 - lr * weight_decay : 1"),
    Scalar("taken1", "1 - beta1"),
    Scalar("smoothing2", "beta2"),
    Scalar("taken2", "1 - beta2"),
    Scalar("rate", "lr / (1 - pow(beta1, step))"),
    Scalar("unbiased", "1 / sqrt(1 - pow(beta2, step))"),
    Scalar("epsilon", "eps"),
)

ADAM = Rule(
    name="adam",
    hyperparameters=("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled"),
    states=(State("exp_avg"), State("exp_avg_sq"), State("max_exp_avg_sq", when="amsgrad")),
    scalars=(*_ADAM_SCALARS, Scalar("of_maxima", "amsgrad")),
    update=_DECAY
    + "p *= shrink;\n"
    + _MOMENTS
    + """
float second = exp_avg_sq;
if (of_maxima != 0.f) {
    // As torch.maximum: NaN wins.
    if (!(max_exp_avg_sq >= exp_avg_sq || max_exp_avg_sq != max_exp_avg_sq)) max_exp_avg_sq = exp_avg_sq;
    second = max_exp_avg_sq;
}
p = fmaf(-rate, exp_avg / fmaf(sqrtf(second), unbiased, epsilon), p);
""",
)

LION = Rule(
    name="lion",
    hyperparameters=("lr", "beta1", "beta2", "weight_decay", "maximize"),
    states=(State("exp_avg"),),
    scalars=(
        _SIGN,
        Scalar("shrink", "1 - lr * weight_decay"),
        Scalar("rate", "lr"),
        Scalar("ahead", "1 - beta1"),
        Scalar("taken", "1 - beta2"),
    ),
    update="""
g *= sign;
float direction = fmaf(ahead, g - exp_avg, exp_avg);
p *= shrink;
// The sign of a NaN is NaN.
direction = direction > 0.f ? 1.f : (direction < 0.f ? -1.f : direction);
p = fmaf(-rate, direction, p);
exp_avg = fmaf(taken, g - exp_avg, exp_avg);
""",
)

LARS = Rule(
    name="lars",
    hyperparameters=(
        *("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
        *("trust_coefficient", "eps"),
    ),
    states=(State("momentum_buffer", when="momentum"),),
    scalars=(
        *SGD.scalars,
        Scalar(
            "trust",
            # A tensor of zeros, or without a gradient, is taken as SGD takes it.
            "first_norm > 0 && second_norm > 0 ? "
            "trust_coefficient * first_norm / (second_norm + weight_decay * first_norm + eps) : 1",
        ),
    ),
    update=SGD.update.replace("if (mu", "g *= trust;\nif (mu", 1),
    norms="""
first = p;
second = g;
""",
)

_LAMB_DIRECTION = (
    "g *= sign;\n"
    + _MOMENTS
    + """
float direction = unbiased1 * exp_avg / fmaf(sqrtf(exp_avg_sq), unbiased2, epsilon);
if (decay != 0.f) direction = fmaf(decay, p, direction);
"""
)
LAMB = Rule(
    name="lamb",
    hyperparameters=("lr", "beta1", "beta2", "eps", "weight_decay", "maximize"),
    states=(State("exp_avg"), State("exp_avg_sq")),
    scalars=(
        _SIGN,
        Scalar("decay", "weight_decay"),
        Scalar("taken1", "1 - beta1"),
        Scalar("smoothing2", "beta2"),
        Scalar("taken2", "1 - beta2"),
        Scalar("unbiased1", "1 / (1 - pow(beta1, step))"),
        Scalar("unbiased2", "1 / sqrt(1 - pow(beta2, step))"),
        Scalar("epsilon", "eps"),
        Scalar("rate", "lr * (first_norm > 0 && second_norm > 0 ? first_norm / second_norm : 1)"),
    ),
    update=_LAMB_DIRECTION + "p = fmaf(-rate, direction, p);\n",
    norms=_LAMB_DIRECTION + "first = p;\nsecond = direction;\n",
)
