"""Why a convolution or a fully-connected layer gets the kernel that it gets, on any named GPU, without one.

:mod:`question` what is asked, :mod:`answer` the plan and its alternatives, :mod:`compiled` their machine code,
:mod:`show` and :mod:`chart` all of it on a terminal.
"""
