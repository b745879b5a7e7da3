from __future__ import annotations

import functools
import inspect

import torch


class _ConstructorSignature:
    """That of a class's ``__init__``, where Python would take ``__new__``'s: for help(), editors and what fills in
    options. A layer, which can be called too, has none of its own."""

    def __get__(self, layer: torch.nn.Module | None, kind: type) -> inspect.Signature:
        if layer is not None:
            raise AttributeError("__signature__")
        own = inspect.signature(kind.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])


class Leaf(torch.nn.Module):
    """Mixin that makes a layer one node of a graph that ``torch.fx`` traces, as the ``torch.nn`` layer it replaces is.

    Tracers of ``torch.fx`` take for one what an object calls its Python module, if that begins with ``torch.nn``.
    TorchScript's compiler, which does not support operators registered in Python, is refused.
    """

    __signature__ = _ConstructorSignature()

    def __new__(cls, *args, **kwargs):
        layer = super().__new__(cls)
        if cls.__module__.startswith("gpukern.nn"):  # a user's subclass is looked into, as one of torch's is
            mark(layer)
        return layer

    def __prepare_scriptable__(self):
        refuse_script(self)


def mark(layer: torch.nn.Module) -> None:
    """Make ``layer`` a node by itself for ``torch.fx``; its class keeps its own name, by which it is pickled."""
    vars(layer)["__module__"] = "torch.nn"


def refuse_script(layer: torch.nn.Module) -> None:
    raise RuntimeError(
        f"gpukern's {type(layer).__name__} is not compiled by torch.jit.script: "
        "use torch.export.export or torch.compile"
    )


# ---- subclasses of other libraries' layers, and of users' containers ------------------------------------------------


@functools.lru_cache(maxsize=1024)
def derived(ours: type[torch.nn.Module], kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """``kind`` with the forward of ``ours``: a subclass of both, named as ``kind``, whose objects can be pickled."""

    def reduce(self: torch.nn.Module, protocol: int) -> tuple:
        # There is no name under which pickle would find the class: it is made anew where the object is.
        return _new, (ours, kind), object.__reduce_ex__(self, 2)[2]

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (ours, kind), {**names, "_derived_from": kind, "__reduce_ex__": reduce})


def derived_from(kind: type[torch.nn.Module]) -> type[torch.nn.Module] | None:
    """Return the ``kind`` of which :func:`derived` made this class; None if it did not."""
    return vars(kind).get("_derived_from")


def _new(ours: type[torch.nn.Module], kind: type[torch.nn.Module]) -> torch.nn.Module:
    made = derived(ours, kind)  # type: ignore[arg-type]  # classes are hashable
    return made.__new__(made)
