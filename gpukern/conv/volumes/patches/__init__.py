"""Convolutions whose windows do not overlap, such as patch embeddings: one matrix product in each direction, in place.

With the stride as large as the kernel, no padding and no dilation, every element of x is in one window, so that x is a
matrix [windows, (c, t, r, s)]: both of its indices are numbers whose digits have strides of their own. Nothing is
copied and nothing is masked within a window; transposed convolutions of that kind, as U-Nets have, are the product of
the input gradient.
"""
