"""Why a convolution or a fully-connected layer gets the kernel that it gets, on any named GPU, without one.

:mod:`query` what is asked, :mod:`ranking` the plan and its alternatives, :mod:`compiled` their machine code,
:mod:`show` and :mod:`chart` all of it on a terminal; :mod:`layers` and :mod:`network` the same for whole networks.
"""
