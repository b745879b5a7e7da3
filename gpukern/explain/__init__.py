"""Explanation of a convolution's or fully-connected layer's kernel choice, for any named GPU, without one.

:mod:`query` has the query, :mod:`ranking` the plan and its alternatives, :mod:`compiled` their machine code,
:mod:`show` and :mod:`chart` all of it on a terminal; :mod:`layers` and :mod:`network` the same for whole networks.
"""
