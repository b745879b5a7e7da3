"""Machine code of every rule, for GPUs that nobody needs to have: wide loads and stores, registers, no spills."""

from __future__ import annotations

import itertools

import pytest

from gpukern.optim._fused import rules, source
from gpukern.optim._fused.rules import Rule
from gpukern.optim._fused.source import Variant
from gpukern.optim._fused.table import GRADIENTS, arguments_type
from tests.optim import nvrtc

pytestmark = pytest.mark.skipif(nvrtc.library() is None, reason="nvidia-cuda-nvrtc-cu12 is not installed")

RULES = (rules.SGD, rules.ADAGRAD, rules.RMSPROP, rules.ADAM, rules.LION, rules.LARS, rules.LAMB)
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
#: As the package and then CuPy give them.
OPTIONS = ("--std=c++17", "-ftz=true")
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Dtypes of parameter, gradient and state, and whether there are master weights.
DTYPES = {
    "fp32": ("float32", "float32", "float32", False),
    "bf16, state fp32": ("bfloat16", "bfloat16", "float32", False),
    "bf16": ("bfloat16", "bfloat16", "bfloat16", False),
    "fp16": ("float16", "float16", "float16", False),
    "bf16, master": ("bfloat16", "bfloat16", "float32", True),
    (MIXED := "fp16, gradient fp32, state bf16"): ("float16", "float32", "bfloat16", False),
}
#: Of a multiprocessor. A thread gets them by eights.
REGISTERS = 65536


def variant(rule: Rule, dtypes: str, **more) -> Variant:
    """With every state that the rule has."""
    parameter, gradient, state, master = DTYPES[dtypes]
    names = tuple(state.name for state in rule.states)
    return Variant(rule, parameter, gradient, state, names, 128, master, **more)


def compiled(given: Variant, architecture: str) -> dict[str, nvrtc.Kernel]:
    return nvrtc.kernels(source.source(given), architecture, OPTIONS)


def blocks(kernel: nvrtc.Kernel) -> int:
    """How many of them a multiprocessor has registers for."""
    return REGISTERS // (-(-kernel.registers // 8) * 8 * source.THREADS)


def wide(given: Variant, *names: str) -> int:
    """Accesses of 16 bytes to the tensors ``names`` for a run of elements, which fills 16 bytes of the narrowest."""
    sizes = {"parameter": SIZES[given.parameter], "gradient": SIZES[given.gradient], "master": 4}
    sizes |= dict.fromkeys(given.states, SIZES[given.state])
    narrowest = min(size for name, size in sizes.items() if name != "master")
    return sum(16 // narrowest * sizes[name] // 16 for name in names)


def faults(given: Variant, kernels: dict[str, nvrtc.Kernel]) -> list[str]:
    """What is wrong with the code, in words."""
    held = "master" if given.master else "parameter"
    written = ("parameter", *(("master",) if given.master else ()), *given.states)
    # The norms of LARS are of the parameter and its gradient alone.
    measured = given.states if given.rule is rules.LAMB else ()
    expected = {
        "update_kernel": (wide(given, held, "gradient", *given.states), wide(given, *written)),
        "square_sum_kernel": (wide(given, "gradient"), 0),
        "norms_kernel": (wide(given, held, "gradient", *measured), 0),
    }
    found = [] if set(kernels) == set(source.kernels(given.rule)) else [f"kernels {sorted(kernels)}"]
    for name, kernel in kernels.items():
        found += _faults(name, kernel, *expected[name], given)
    return found


def _faults(name: str, kernel: nvrtc.Kernel, loads: int, stores: int, given: Variant) -> list[str]:
    # 32 warps of 64 where every number is of fp32, else 24: enough to wait for memory meanwhile.
    least = 1024 if name == "update_kernel" and given.parameter == given.state == "float32" else 768
    threads = blocks(kernel) * source.THREADS
    checks = {
        f"{kernel.stack} bytes of stack": kernel.stack == 0,
        "local memory": kernel.count("LDL") + kernel.count("STL") == 0,
        f"{kernel.count('LDG', '128')} loads of 16 bytes, not {loads}": kernel.count("LDG", "128") == loads,
        f"{kernel.count('STG', '128')} stores of 16 bytes, not {stores}": kernel.count("STG", "128") == stores,
        "generic addresses": kernel.count("LD", "128") + kernel.count("ST", "128") == 0,
        f"{kernel.registers} registers, {threads} threads": threads >= least,
    }
    return [f"{name}: {what}" for what, right in checks.items() if not right]


@pytest.mark.parametrize(
    ("dtypes", "architecture"),
    # Of three different dtypes for one architecture only: each takes its time.
    [*itertools.product([name for name in DTYPES if name != MIXED], ARCHITECTURES), (MIXED, "sm_90")],
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_machine_code(rule, dtypes, architecture):
    given = variant(rule, dtypes)
    assert not faults(given, compiled(given, architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_most_pointers_and_random_rounding(architecture):
    """As many gradients as travel by value: more than an argument could be in CUDA 12.0 and before."""
    parameter, gradient, state, _ = DTYPES["bf16"]
    given = Variant(rules.ADAM, parameter, gradient, state, ("exp_avg", "exp_avg_sq"), GRADIENTS[-1], stochastic=True)
    assert not faults(given, compiled(given, architecture))
    assert arguments_type(GRADIENTS[-1]).itemsize <= 32764


def test_one_element_at_a_time_is_seen():
    given = variant(rules.ADAM, "fp32")
    text = source.source(given)
    runs = "constexpr int RUN = 16 /"
    assert runs in text
    narrow = nvrtc.kernels(text.replace(runs, "constexpr int RUN = 4 /"), "sm_90", OPTIONS)
    found = faults(given, narrow)
    assert any("0 loads of 16 bytes, not 5" in each for each in found), found
    assert any("0 stores of 16 bytes, not 4" in each for each in found), found


def test_spills_are_seen():
    given = variant(rules.ADAM, "bf16")
    tight = source.source(given).replace("RESIDENT = 3", "RESIDENT = 8")
    found = faults(given, nvrtc.kernels(tight, "sm_90", OPTIONS))
    assert any("bytes of stack" in each for each in found) and any("local memory" in each for each in found), found


def test_too_many_registers_are_seen():
    given = variant(rules.ADAM, "bf16")
    greedy = nvrtc.Kernel(registers=88, stack=0, shared_memory=0)
    assert "update_kernel: 88 registers, 512 threads" in faults(given, {"update_kernel": greedy})


def test_what_does_not_compile_says_why():
    with pytest.raises(nvrtc.CompileError, match='identifier "unknown" is undefined'):
        nvrtc.compile_text('extern "C" __global__ void kernel() { unknown(); }', "sm_90", OPTIONS)
