"""Convolutions whose windows do not overlap, such as patch embeddings: one matrix product in each direction, in place.

With a stride as large as the kernel or larger, no padding and no dilation, x is a matrix [windows, (c, t, r, s)]: both
of its indices are numbers whose digits have strides of their own. Nothing is copied and nothing is masked within a
window. The input gradient is such a product too where every element is in a window; transposed convolutions of that
kind, as U-Nets have, are that product.
"""
