"""Convolutions of volumes [N, C, D, H, W]: the engine's products with one more dimension of taps.

No family of ``gpukern/conv/families``: those are planned, estimated and launched by the sizes of images, and none but
implicit GEMM has kernels for another dimension of taps. What has no dimensions is shared: tiles and their estimate, the
epilogue, the splits of sums, the rounding of operands. Where a volume's convolution is one of images (a kernel of depth
1, or of height and width 1), the families of the engine compute it, see ``views.py``.
"""
