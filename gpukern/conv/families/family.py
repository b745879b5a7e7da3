"""A kernel family's description for planner, cost model and tools. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from gpukern.conv.plan import ConvPlan, Direction, Operands, Variant
from gpukern.conv.problem import ConvProblem
from gpukern.runtime.device import DeviceSpec


def _never(plan: ConvPlan) -> bool:
    return False


def _not_through(plan: ConvPlan, activation: str) -> bool:
    return False


def few_sums(plan: ConvPlan, activation: str) -> bool:
    """Whether so few sums a thread leave registers for the epilogue through a batch norm: :attr:`takes_norm_grad`.

    Found by compiling for sm_90: with more than 64 some activation spills. The addresses of partial sums leave room for
    half as many, and so does the derivative of gelu, the longest of all.
    """
    halvings = (plan.splits > 1) + (activation == "gelu")
    return plan.sums_per_thread <= 64 >> halvings


def _no_passes(problem: ConvProblem, itemsize: int) -> tuple[int, int]:
    return 0, 0


def _of_blocks(problem: ConvProblem, plan: ConvPlan) -> int:
    return plan.block_m * plan.block_n


# eq=False: a family is made once, by its plan.py.
@dataclass(frozen=True, eq=False)
class Family:
    """Kernels that share a ``plan.py`` and a ``launch.py``, in the folder of the same ``name``."""

    name: str
    #: Every plan worth considering; none if the kernels do not serve the problem.
    candidates: Callable[[ConvProblem, Direction, Operands, DeviceSpec], Iterator[ConvPlan]]
    #: (tiles, steps of ``plan.block_k`` that each walks), all that the kernel does.
    tiles: Callable[[ConvProblem, Direction, ConvPlan], list[tuple[int, int]]]
    #: Share of the peak rate that the main loop of each variant reaches: of the tensor cores', or of the
    #: multiply-adds' where it is one of ``elementwise``. Fitted by ``python -m bench.calibrate``.
    main_loop_efficiency: Mapping[Variant, float]
    #: Variants that multiply element by element, outside the tensor cores.
    elementwise: frozenset[Variant] = frozenset()
    #: Variants that can read and write across runs of channels; they move whole sectors for single elements.
    across_runs: frozenset[Variant] = frozenset()
    #: Whether the kernels can write the maxima of 2 × 2 pixels.
    can_pool: bool = False
    #: Whether there are candidates for quantized launches: ``operands.quantized``.
    takes_quantized: bool = False
    #: Whether operands are fetched by descriptors.
    uses_descriptors: bool = False
    #: Whether these fetches are short rows, each a request of its own.
    fetches_short_rows: bool = False
    #: Whether a program has a multiprocessor to itself.
    one_program_per_sm: bool = False
    #: Whether the kernels take any tile, not only those that ``candidates`` offers.
    any_tile: bool = False
    #: Whether Triton's interpreter can run the kernels.
    emulated: bool = True
    #: Whether nothing but a GPU can show that a plan is right: it is chosen only if the plan database has it.
    needs_measurement: Callable[[ConvPlan], bool] = _never
    #: Whether the kernel of an input gradient's plan can go on through a batch norm and the activation of that name
    #: (``Epilogue.norm_grad``): it must leave registers for them.
    takes_norm_grad: Callable[[ConvPlan, str], bool] = _not_through
    #: (launches before the main one, bytes that they and it move beyond the operands), from problem and itemsize.
    extra_passes: Callable[[ConvProblem, int], tuple[int, int]] = _no_passes
    #: Sums of a weight gradient's tile, which splits share.
    tile_sums: Callable[[ConvProblem, ConvPlan], int] = _of_blocks

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(self.main_loop_efficiency)

    @property
    def launch_module(self) -> str:
        """The module whose ``prepare(request, plan)`` gives the launch; it needs Triton."""
        return f"gpukern.conv.families.{self.name}.launch"
