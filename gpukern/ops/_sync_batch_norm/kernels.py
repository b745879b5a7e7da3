"""The kernel of batch norm across processes; statistics, results and gradients are those of batch norm's own."""

import triton
import triton.language as tl

from gpukern.ops._reduction.functions import finish_statistics


@triton.jit
def merge_processes_kernel(
    messages,  # fp32 [processes, 2 · channels + 1]: means, biased variances, and how many values a channel has
    statistics,  # Statistics
    count_ptr,  # fp32 [1]
    processes, channels, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and variance of all processes' values, by Chan, Golub and LeVeque's formula, in the processes' order.

    A process without values changes nothing; nor does a batch that is empty everywhere the running statistics.
    """
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = c < channels
    mean = tl.zeros((BLOCK,), tl.float32)
    deviations = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((1,), tl.float32)
    for process in range(processes):
        message = messages + tl.cast(process, tl.int64) * (2 * channels + 1)
        new = tl.load(message + 2 * channels)
        apart = tl.load(message + c, mask=valid, other=0.0) - mean
        variance = tl.load(message + channels + c, mask=valid, other=0.0)
        share = new / tl.maximum(count + new, 1.0)
        mean += apart * share
        deviations += variance * new + apart * apart * (count * share)
        count += new
    finish_statistics(statistics, mean, deviations, tl.maximum(count, 1.0), c, valid & (count > 0.0))
    tl.store(count_ptr + tl.arange(0, 1), count)
