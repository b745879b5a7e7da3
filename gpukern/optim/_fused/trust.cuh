// The norms of each tensor that a rule asks for. After norms.cuh, for rules that have any.

struct OfRule {
    static constexpr int TOGETHER = MEASURES_STATES ? 1 : 2;
    double first = 0, second = 0;

    template <typename E> DEVICE void fetch(E &some, const Work &work, i64 at) { some.fetch_from(work, at); }

    template <typename E> DEVICE void take(E &some, const Work &work, i64) {
        some.finish_gradient(work);
        float a = 0.f, b = 0.f;
#pragma unroll
        for (int i = 0; i < E::SIZE; ++i) {
            float one = 0.f, other = 0.f;
            some.measure_one(i, work.scalars, one, other);
            a = fmaf(one, one, a);
            b = fmaf(other, other, b);
        }
        first += a;
        second += b;
    }
};

// The two norms of each tensor that the rule asks for.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) norms_kernel(const Arguments all) {
    __shared__ Work work;
    const bool busy = begin(all, work, true);
    if (!leave_partial(all, busy, work, OfRule())) return;
    for (int t = threadIdx.x; t < all.tensor_count; t += blockDim.x) {
        const double *partial = all.partial + 2 * (i64)all.tensors[t].first_chunk;
        double first = 0, second = 0;
        for (int chunk = 0; chunk < all.tensors[t].chunks; ++chunk) {
            first += partial[2 * chunk];
            second += partial[2 * chunk + 1];
        }
        all.norms[2 * t] = sqrt(first);
        all.norms[2 * t + 1] = sqrt(second);
    }
}
