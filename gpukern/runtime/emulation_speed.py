"""Removal of redundant work from Triton's interpreter. Used only when emulating.

An emulated kernel spends most of its time outside NumPy: the interpreter patches all of ``triton.language`` again
whenever one device function calls another, rebuilds the types and shapes of every value, and checks each sum and
product of integers for overflow by ten further operations on tensors, without reading the result. What a kernel
computes and what is refused stay the same.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def prepare() -> None:
    """Patch the interpreter."""
    _patch_once_a_launch()
    _share_shapes()
    _look_dtypes_up()
    _skip_checks_that_nobody_reads()


class _NothingToRestore:
    def restore(self) -> None:
        pass


def _patch_once_a_launch() -> None:
    plain = interpreter._patch_lang
    patched: set[int] = set()

    def patch_lang(fn: Callable) -> Any:
        """Skip the patch for a device function called by a kernel: its modules are patched already."""
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is core}
        if modules and modules <= patched:
            return _NothingToRestore()
        scope = plain(fn)
        patched.update(modules)
        restore = scope.restore

        def restore_and_forget() -> None:
            patched.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    def patch_attribute(obj: Any, name: str, member: Callable, builder: Any, scope: Any) -> None:
        semantic = interpreter.interpreter_semantic

        def interpreted(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        scope.set_attr(obj, name, interpreted)

    interpreter._patch_lang = patch_lang
    interpreter._patch_attr = patch_attribute


def _share_shapes() -> None:
    """Share one shape's tuple, checks and number of elements among its tensors and block types."""
    plain = core.block_type.__init__
    of_block: dict[tuple, tuple] = {}
    names: dict[tuple, str] = {}
    of_tensor: dict[tuple, tuple] = {}

    def init_block(self: core.block_type, element_ty: core.dtype, shape: Any) -> None:
        sizes = builtins.tuple([each.value if isinstance(each, core.constexpr) else each for each in shape])
        if sizes not in of_block:
            plain(self, element_ty, shape)
            of_block[sizes] = self.shape, self.numel
        self.element_ty = element_ty
        self.shape, self.numel = of_block[sizes]
        of_name = sizes, element_ty.name
        if of_name not in names:
            names[of_name] = f"<{self.shape}, {self.element_ty}>"
        self.name = names[of_name]

    def init_tensor(self: core.tensor, handle: Any, type: core.dtype) -> None:
        sizes = builtins.tuple(type.shape) if type.is_block() else ()
        if sizes not in of_tensor:
            shape = core.tuple([core.constexpr(size) for size in sizes])
            of_tensor[sizes] = shape, core.constexpr(math.prod(sizes))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensor[sizes]

    core.block_type.__init__ = init_block
    core.tensor.__init__ = init_tensor


def _look_dtypes_up() -> None:
    plain = interpreter._get_np_dtype
    found: dict[str, np.dtype] = {}

    def numpy_dtype(kind: core.dtype) -> np.dtype:
        scalar = kind.scalar
        if scalar.name not in found:
            found[scalar.name] = plain(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = numpy_dtype


def _skip_checks_that_nobody_reads() -> None:
    """Skip the overflow check of integer sums and products: it ends in an assertion, which is off without debug."""
    plain = TritonSemantic.binary_op_sanitize_overflow_impl

    def check(self: TritonSemantic, lhs: core.tensor, rhs: core.tensor, binary_op: Callable) -> None:
        if self.builder.options.debug:
            plain(self, lhs, rhs, binary_op)

    TritonSemantic.binary_op_sanitize_overflow_impl = check
