// The sum of the squares of all gradients, and what a rule's norms are made with. After multi_tensor.cuh.

// The sum over the block's threads, in thread 0, always added in the same order.
DEVICE double block_sum(double mine) {
    __shared__ double parts[THREADS];
    parts[threadIdx.x] = mine;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half && threadIdx.x + half < blockDim.x) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    __syncthreads();
    const double sum = parts[0];
    __syncthreads();
    return sum;
}

// Leaves the two sums of squares of this block's chunk, zeros where there is nothing to do; whether it is the last.
template <typename Measure> DEVICE bool leave_partial(const Arguments &all, bool busy, const Work &work, Measure sums) {
    if (busy) walk(work, sums);
    const double first = block_sum(sums.first), second = block_sum(sums.second);
    if (threadIdx.x == 0) {
        all.partial[2 * blockIdx.x] = first;
        all.partial[2 * blockIdx.x + 1] = second;
    }
    return is_last(all.arrived);
}

// Of this thread's part.
struct OfGradient {
    static constexpr int TOGETHER = 4;
    double first = 0, second = 0;

    template <typename E> DEVICE void fetch(E &some, const Work &work, i64 at) { some.fetch_gradient(work, at); }

    template <typename E> DEVICE void take(E &some, const Work &work, i64) {
        some.finish_gradient(work);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < E::SIZE; ++i) sum = fmaf(some.g[i], some.g[i], sum);
        first += sum;
    }
};

// The sum of the squares of all gradients, for their norm.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) square_sum_kernel(const Arguments all) {
    __shared__ Work work;
    const bool busy = begin(all, work, false);
    if (!leave_partial(all, busy, work, OfGradient())) return;
    double sum = 0;
    for (int chunk = threadIdx.x; chunk < (int)gridDim.x; chunk += blockDim.x) sum += all.partial[2 * chunk];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *all.square_sum = sum;
}
