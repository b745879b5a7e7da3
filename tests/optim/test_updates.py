"""Ten updates of every optimizer with every option, each against torch's single-tensor code in fp64."""

from __future__ import annotations

import pytest
import torch

from gpukern.runtime.mode import Mode, force_mode
from tests.optim.cases import CASES, FULL, Case, give_gradients, numbers, parameters

#: Roundings to fp32 in an update, each of at most half an ulp of the largest number that takes part: the products and
#: sums of the rule, a division, a square root and the scalars that it is made with. 16 is more than any rule has.
ROUNDINGS = 16
STEPS = 10
EPS = 2.0**-23


class Exact:
    """The same optimizer in fp64, put into the state of ours before each update: what differs is that update's own."""

    def __init__(self, case: Case, ours, owners) -> None:
        self.case, self.ours, self.owners = case, ours, owners
        self.numbers = numbers(case)
        self.values = [self._value(owner).double() for owner in owners]
        self.states = [
            {k: self._stored(v) for k, v in ours.state.get(owner, {}).items() if isinstance(v, torch.Tensor)}
            for owner in owners
        ]
        self.gradients = [None if owner.grad is None else owner.grad.double() for owner in owners]

    def _stored(self, state: torch.Tensor) -> torch.Tensor:
        """As ours has it when it updates: torch's Adagrad makes its state before it knows of another dtype."""
        return state.to(self.ours._state_dtype or state.dtype if state.dim() else state.dtype).double()

    def _value(self, owner) -> torch.Tensor:
        return self.ours.state.get(owner, {}).get("master", owner.detach()).clone()

    def step(self, number: int) -> None:
        if self.case.torchs is None:
            self._own(number)
            return
        twins = [torch.nn.Parameter(value) for value in self.values]
        exact = self.case.torchs(twins, **self.case.options, foreach=False)
        for twin, state, gradient in zip(twins, self.states, self.gradients, strict=True):
            twin.grad = gradient
            held = {name: value for name, value in state.items() if name != "master"}
            if held:
                exact.state[twin].update(held)
                if "step" in exact.state[twin]:
                    exact.state[twin]["step"] = held["step"].float()
        exact.step()
        self.values = [twin.detach() for twin in twins]
        self.states = [exact.state[twin] for twin in twins]

    def _own(self, number: int) -> None:
        """The formulas of the papers, for what torch does not have."""
        rule = {"Lion": _lion, "LARS": _lars, "LAMB": _lamb}[self.case.name]
        for place, gradient in enumerate(self.gradients):
            g = -gradient if self.numbers["maximize"] else gradient
            self.values[place], self.states[place] = rule(
                self.values[place], g, self.states[place], self.numbers, number + 1
            )


def _lion(p, g, state, n, t):
    m = state.get("exp_avg", torch.zeros_like(p))
    p = p - n["lr"] * n["weight_decay"] * p - n["lr"] * torch.sign(n["beta1"] * m + (1 - n["beta1"]) * g)
    return p, {"exp_avg": n["beta2"] * m + (1 - n["beta2"]) * g}


def _lars(p, g, state, n, t):
    size, slope = p.norm(), g.norm()
    trust = n["trust_coefficient"] * size / (slope + n["weight_decay"] * size + n["eps"]) if size * slope > 0 else 1.0
    g = trust * (g + n["weight_decay"] * p)
    if not n["momentum"]:
        return p - n["lr"] * g, {}
    b = g if t == 1 else n["momentum"] * state["momentum_buffer"] + (1 - n["dampening"]) * g
    return p - n["lr"] * (g + n["momentum"] * b if n["nesterov"] else b), {"momentum_buffer": b}


def _lamb(p, g, state, n, t):
    m = n["beta1"] * state.get("exp_avg", torch.zeros_like(p)) + (1 - n["beta1"]) * g
    v = n["beta2"] * state.get("exp_avg_sq", torch.zeros_like(p)) + (1 - n["beta2"]) * g * g
    u = m / (1 - n["beta1"] ** t) / ((v / (1 - n["beta2"] ** t)).sqrt() + n["eps"]) + n["weight_decay"] * p
    ratio = p.norm() / u.norm() if p.norm() * u.norm() > 0 else 1.0
    return p - n["lr"] * ratio * u, {"exp_avg": m, "exp_avg_sq": v}


def stored(dtype: torch.dtype, value: torch.Tensor) -> torch.Tensor:
    """How far from ``value`` its rounding to ``dtype`` may be: half an ulp, half the distance of subnormal numbers."""
    info = torch.finfo(dtype)
    return (info.eps * value.abs() + info.tiny * info.eps) / 2


def check(optimizer, owners, exact: Exact, before: list[torch.Tensor]) -> None:
    """``before``: the parameters then. An update u = p' − p has a relative error of ROUNDINGS · eps/2, more where the
    numbers that it is made of are larger than their sum: those are at most ten times as large here, as the gradients
    are of one size. Storing rounds once more, to the dtype of what is stored."""
    for owner, value, state, old in zip(owners, exact.values, exact.states, before, strict=True):
        kept = optimizer.state.get(owner, {})
        got = kept.get("master", owner.detach())
        bound = EPS * ROUNDINGS * (10 * (value - old).abs() + old.abs()) + stored(got.dtype, value)
        assert_within(got, value, bound, "parameter")
        for name, want in state.items():
            if name in ("step", "master") or not isinstance(want, torch.Tensor) or not want.dim():
                continue
            scale = want.abs() + owner.grad.double().abs() ** (2 if "sq" in name or name == "sum" else 1)
            # RMSprop's buffer holds directions, LARS's gradients with decay, neither larger than ten gradients.
            scale = scale + (10 if name == "momentum_buffer" else 0)
            bound = EPS * ROUNDINGS * scale + stored(kept[name].dtype, want)
            assert_within(kept[name], want, bound, name)


def assert_within(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    assert got.shape == want.shape
    off = (got.double() - want).abs() > bound
    assert not off.any(), (
        f"{what}: {int(off.sum())} of {off.numel()} off, by {((got.double() - want).abs() / bound).max():.2f} bounds"
    )


def ten_steps(case: Case, device, dtype=torch.float32, of_gradients: torch.dtype | None = None, **more) -> None:
    owners = parameters(dtype, device)
    for owner in owners:
        owner.grad_dtype = of_gradients or dtype
    optimizer = case.ours(owners, **case.options, **more)
    for number in range(STEPS):
        give_gradients(owners, number, of_gradients)
        exact = Exact(case, optimizer, owners)
        before = [value.clone() for value in exact.values]
        exact.step(number)
        optimizer.step()
        check(optimizer, owners, exact, before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32(case, device):
    ten_steps(case, device)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        (torch.bfloat16, {}),
        (torch.float16, {}),
        (torch.bfloat16, {"state_dtype": torch.float32}),
        (torch.float16, {"state_dtype": torch.bfloat16}),
        (torch.float32, {"state_dtype": torch.bfloat16}),
        (torch.bfloat16, {"master_weights": True, "state_dtype": torch.float32}),
        (torch.float16, {"master_weights": True}),
    ],
    ids=lambda value: " ".join(f"{n}={v}" for n, v in value.items()) if isinstance(value, dict) else str(value),
)
def test_dtypes(case, dtype, more, device):
    ten_steps(case, device, dtype, **more)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize(
    ("dtype", "of_gradients"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_gradients_of_another_dtype(case, dtype, of_gradients, device):
    ten_steps(case, device, dtype, of_gradients, state_dtype=torch.float32)


@pytest.mark.parametrize("case", [case for case in CASES if case.torchs is not None], ids=str)
def test_without_kernels_float32_gets_torch_s_bits(case):
    with force_mode(Mode.REFERENCE):
        owners, twins = parameters(), parameters()
        ours, theirs = case.ours(owners, **case.options), case.torchs(twins, **case.options, foreach=False)
        for number in range(6):
            give_gradients(owners, number)
            give_gradients(twins, number)
            ours.step()
            theirs.step()
    assert all(torch.equal(owner, twin) for owner, twin in zip(owners, twins, strict=True))
