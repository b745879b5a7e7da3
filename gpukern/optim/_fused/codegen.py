"""Source of a rule's kernels for one combination of dtypes: the specific part, then the shared text."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from gpukern.optim._fused.rules import Rule

#: Threads of a block.
THREADS = 256
#: Words of 32 bits that a thread loads at once if three blocks are to share a multiprocessor, with 80 registers for
#: each thread; two blocks of threads that load more keep the memory as busy.
_WORDS_OF_THREE = 32

_HERE = Path(__file__).parent
_TYPES = {"float32": "float", "float16": "Half", "bfloat16": "BFloat16"}
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Variant:
    """The variant that a program is compiled for: dtypes by name, and which states are kept.

    ``gradients``: pointers passed with a launch. ``master``: whether an fp32 copy of each parameter is updated in its
    place. ``stochastic``: whether bfloat16 parameters are rounded stochastically.
    """

    rule: Rule
    parameter: str
    gradient: str
    state: str
    states: tuple[str, ...]
    gradients: int
    master: bool = False
    stochastic: bool = False

    @property
    def run(self) -> int:
        """Number of elements that a thread takes at once: those that fill 16 bytes of the narrowest tensor."""
        dtypes = (self.parameter, self.gradient, *((self.state,) if self.states else ()))
        return 16 // min(_SIZES[dtype] for dtype in dtypes)

    @property
    def resident(self) -> int:
        """Number of blocks for which a multiprocessor has registers. Without this bound ptxas sometimes aims at fewer
        registers, and spills."""
        dtypes = ("float32" if self.master else self.parameter, self.gradient, *(self.state for _ in self.states))
        return 3 if self.run * sum(_SIZES[dtype] for dtype in dtypes) <= 4 * _WORDS_OF_THREE else 2


@functools.cache
def source(variant: Variant, platform: str = "device.cuh") -> str:
    """Return CUDA C++17 without includes, for NVRTC; with ``platform`` "host.h", C++20 for a host compiler."""
    parts = [_read(platform), _head(variant), _read("multi_tensor.cuh"), _read("norms.cuh")]
    if variant.rule.norms:
        parts.append(_read("trust.cuh"))
    if platform == "host.h":
        parts += map(_host_entry, kernels(variant.rule))
    return "\n".join(parts)


def kernels(rule: Rule) -> tuple[str, ...]:
    """Return the names of the source's kernels: the update, and the one that a launch before it may run."""
    return ("update_kernel", "square_sum_kernel", *(("norms_kernel",) if rule.norms else ()))


def elementwise(rule: Rule) -> tuple[str, str, str]:
    """Return a rule's inputs, outputs and operation on one tensor, as ``cupy.ElementwiseKernel`` takes them.

    The states follow the parameter in their order. Rules that need norms have no such form.
    """
    if rule.norms:
        raise ValueError(f"{rule.name} needs norms of whole tensors before it updates an element")
    names = [state.name for state in rule.states]
    given = ["float32 gradient", *(f"float64 {name}" for name in (*rule.hyperparameters, "step"))]
    changed = ["float32 p", *(f"float32 {name}" for name in names)]
    computed = [f"const float {scalar.name} = (float)({scalar.value});" for scalar in rule.scalars]
    return ", ".join(given), ", ".join(changed), "\n".join((*computed, "float g = gradient;", rule.update))


def _head(variant: Variant) -> str:
    rule = variant.rule
    hyper, scalars = rule.hyperparameters, rule.scalars
    kinds = {"PARAMETER": variant.parameter, "GRADIENT": variant.gradient, "STATE": variant.state}
    numbers = {
        **{"THREADS": THREADS, "RESIDENT": variant.resident, "RUN": variant.run},
        **{"STATES": len(variant.states), "GRADIENTS": variant.gradients},
    }
    flags = {
        **{"MASTER": variant.master, "STOCHASTIC": variant.stochastic, "TRUST": bool(rule.norms)},
        "MEASURES_STATES": any(state.name in rule.norms for state in rule.states),
    }
    dtypes = "struct BFloat16 { unsigned short bits; };\nstruct Half { unsigned short bits; };\n"
    lines = [
        dtypes + "\n".join(f"using {name} = {_TYPES[dtype]};" for name, dtype in kinds.items()),
        *(f"constexpr int {name} = {value};" for name, value in numbers.items()),
        *(f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()),
        f"struct Hyper {{ double {', '.join(hyper)}; }};",
        f"struct Scalars {{ float {', '.join(scalar.name for scalar in scalars)}; }};",
        "DEVICE Scalars prepare(const Hyper &hyper, double step, double first_norm, double second_norm) {",
        *(f"    const double {name} = hyper.{name};" for name in hyper),
        f"    return Scalars{{{', '.join(f'(float)({scalar.value})' for scalar in scalars)}}};",
        "}",
        "DEVICE void update(float &p, float g, float *states, const Scalars &scalars) {",
        *_names(variant),
        rule.update,
        "}",
        "DEVICE void measure(float p, float g, float *states, const Scalars &scalars, float &first, float &second) {",
        *_names(variant),
        rule.norms,
        "}",
    ]
    return "\n".join(lines)


def _names(variant: Variant) -> list[str]:
    """Declare the states and scalars by name; a state that is not kept is an unused number."""
    states = [
        f"    float &{state.name} = states[{variant.states.index(state.name)}];"
        if state.name in variant.states
        else f"    float {state.name} = 0.f;"
        for state in variant.rule.states
    ]
    return [*states, *(f"    const float {scalar.name} = scalars.{scalar.name};" for scalar in variant.rule.scalars)]


def _host_entry(kernel: str) -> str:
    return (
        f'extern "C" void {kernel}_on_host(unsigned int blocks, unsigned int threads, const Arguments *given) '
        f"{{ run_on_host({kernel}, blocks, threads, given); }}"
    )


@functools.cache
def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
