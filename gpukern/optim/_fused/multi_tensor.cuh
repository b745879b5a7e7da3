// All parameters of one device and one combination of dtypes, updated in one launch.
//
// What source.py puts before this: PARAMETER, GRADIENT and STATE (float, Half or BFloat16), MASTER, STOCHASTIC and TRUST,
// STATES (their number), GRADIENTS (pointers that travel by value), THREADS and RESIDENT, Hyper, Scalars, prepare(),
// update() and measure(); and device.cuh, for NVRTC, or host.h, for a CPU.

typedef unsigned long long u64;
typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

// ---- what lies in device memory, as table.py lays it out ----

struct Tensor {
    u64 parameter;
    u64 master;  // fp32, where MASTER
    u64 states[STATES > 0 ? STATES : 1];  // 0 for a state that the group has no use for
    u64 step;  // fp32: the number of updates so far
    i64 size;
    int group;
    int first_chunk;
    int chunks;
    int padding;
};

struct Chunk {
    int tensor;
    int number;
};

struct Group {
    u64 lr;  // of a learning rate that is a tensor: its place; else 0
    Hyper hyper;
};

struct Arguments {
    const Tensor *tensors;
    const Chunk *chunks;
    const Group *groups;
    u32 *arrived;  // zero between launches
    const float *grad_scale;  // what the loss was multiplied with, or null
    const float *found_inf;  // not zero: nothing is done; or null
    double *partial;  // [chunks, 2], the sums of squares of each
    double *norms;  // [tensors, 2], where TRUST
    double *square_sum;  // of all gradients: written by square_sum_kernel; the update reads it where max_norm > 0
    double max_norm;
    float max_value;  // gradients are cut to ± this where it is > 0
    int tensor_count;
    int chunk_size;
    u32 seed;
    u64 gradients[GRADIENTS];  // 0 for a tensor without one
};

// ---- numbers of 16 bits, without the toolkit's headers ----

DEVICE float as_float(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
DEVICE u32 as_bits(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }

DEVICE float widened(float x) { return x; }
DEVICE float widened(Half x) { return half_to_float(x.bits); }
DEVICE float widened(BFloat16 x) { return as_float((u32)x.bits << 16); }

DEVICE float rounded(float x, float) { return x; }
DEVICE Half rounded(float x, Half) { return Half{float_to_half(x)}; }
// To the nearest, of two equally near to the even one. ``added`` is what makes it so, or random bits.
DEVICE BFloat16 carried(float x, u32 added) { return BFloat16{(u16)((as_bits(x) + added) >> 16)}; }
DEVICE BFloat16 rounded(float x, BFloat16) {
    return x != x ? BFloat16{0x7fff} : carried(x, 0x7fffu + (as_bits(x) >> 16 & 1u));
}

// Up as often as what is cut off is large. Of a number that random bits could carry to infinity, the nearest.
template <typename T> DEVICE T rounded_at_random(float x, u32) { return rounded(x, T()); }
template <> DEVICE BFloat16 rounded_at_random<BFloat16>(float x, u32 random) {
    return (as_bits(x) & 0x7fffffffu) < 0x7f7f0000u ? carried(x, random & 0xffffu) : rounded(x, BFloat16());
}

// A hash of 32 bits in which every bit of the result depends on every bit of x (Wellons, "Prospecting for hash
// functions", 2018).
DEVICE u32 mixed(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// ---- elements: one, or a run of whole 16 bytes of every tensor ----

DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
// 16 bytes of the narrowest.
constexpr int RUN = 16 / smaller(sizeof(PARAMETER), smaller(sizeof(GRADIENT), STATES > 0 ? sizeof(STATE) : 4));

template <typename T, int COUNT> DEVICE void fetch(float (&to)[COUNT], u64 place, i64 index) {
    const T *from = (const T *)place + index;
    if (COUNT == 1) {
        to[0] = widened(*from);
        return;
    }
    alignas(16) T run[COUNT];
#pragma unroll
    for (int part = 0; part < (int)sizeof(run) / 16; ++part) load16((char *)run + 16 * part, (const char *)from + 16 * part);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = widened(run[i]);
}

template <typename T, int COUNT> DEVICE void put(const T (&run)[COUNT], u64 place, i64 index) {
    T *to = (T *)place + index;
    if (COUNT == 1) {
        *to = run[0];
        return;
    }
#pragma unroll
    for (int part = 0; part < (int)sizeof(run) / 16; ++part) store16((char *)to + 16 * part, (const char *)run + 16 * part);
}

template <typename T, int COUNT> DEVICE void put_rounded(const float (&from)[COUNT], u64 place, i64 index) {
    alignas(16) T run[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) run[i] = rounded(from[i], T());
    put(run, place, index);
}

// What a chunk is, and what its block knows of it.
struct Work {
    Tensor tensor;
    u64 gradient;
    i64 first;
    int number, count, skipped, runs;
    float scale, unscale, max_value;
    u32 seed;
    Scalars scalars;
};

template <int COUNT> struct Elements {
    float p[COUNT], g[COUNT], states[STATES > 0 ? STATES : 1][COUNT];

    DEVICE void fetch_from(const Work &work, i64 at) {
        if (MASTER)
            fetch<float>(p, work.tensor.master, at);
        else
            fetch<PARAMETER>(p, work.tensor.parameter, at);
#pragma unroll
        for (int s = 0; s < STATES; ++s)
            if (work.tensor.states[s]) fetch<STATE>(states[s], work.tensor.states[s], at);
        fetch_gradient(work, at);
    }

    DEVICE void fetch_gradient(const Work &work, i64 at) {
        fetch<GRADIENT>(g, work.gradient, at);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            g[i] = g[i] / work.unscale * work.scale;
            // Comparisons with a NaN are false: it stays.
            if (work.max_value > 0.f && g[i] > work.max_value) g[i] = work.max_value;
            if (work.max_value > 0.f && g[i] < -work.max_value) g[i] = -work.max_value;
        }
    }

    DEVICE void store_to(const Work &work, i64 at) const {
        if (MASTER) put_rounded<float>(p, work.tensor.master, at);
        alignas(16) PARAMETER run[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            run[i] = STOCHASTIC && !MASTER ? rounded_at_random<PARAMETER>(p[i], mixed(work.seed ^ mixed((u32)(at + i))))
                                           : rounded(p[i], PARAMETER());
        put(run, work.tensor.parameter, at);
#pragma unroll
        for (int s = 0; s < STATES; ++s)
            if (work.tensor.states[s]) put_rounded<STATE>(states[s], work.tensor.states[s], at);
    }

    DEVICE void update_one(int i, const Scalars &scalars) {
        float own[STATES > 0 ? STATES : 1];
#pragma unroll
        for (int s = 0; s < STATES; ++s) own[s] = states[s][i];
        update(p[i], g[i], own, scalars);
#pragma unroll
        for (int s = 0; s < STATES; ++s) states[s][i] = own[s];
    }

    DEVICE void measure_one(int i, const Scalars &scalars, float &first, float &second) const {
        float own[STATES > 0 ? STATES : 1];
#pragma unroll
        for (int s = 0; s < STATES; ++s) own[s] = states[s][i];
        measure(p[i], g[i], own, scalars, first, second);
    }
};

// ---- a block takes a chunk ----

template <typename T> DEVICE bool starts_at_16_bytes(u64 place, int skipped) {
    return place == 0 || (place + (u64)skipped * sizeof(T)) % 16 == 0;
}

// The first elements up to which nothing is aligned, and after which everything is; -1 where tensors disagree. All
// chunks of a tensor begin alike.
DEVICE int misaligned(const Work &work) {
    for (int skipped = 0; skipped < RUN; ++skipped) {
        bool aligned = starts_at_16_bytes<PARAMETER>(work.tensor.parameter, skipped) &&
                       starts_at_16_bytes<GRADIENT>(work.gradient, skipped);
        if (MASTER) aligned = aligned && starts_at_16_bytes<float>(work.tensor.master, skipped);
        for (int s = 0; s < STATES; ++s)
            aligned = aligned && starts_at_16_bytes<STATE>(work.tensor.states[s], skipped);
        if (aligned) return skipped;
    }
    return -1;
}

// What the block's thread 0 knows of an update: how the gradient is clipped, and the rule's scalars.
DEVICE void begin_update(const Arguments &all, Work &work) {
    work.max_value = all.max_value;
    if (all.max_norm > 0) {
        // As torch.nn.utils.clip_grad_norm_; a NaN stays one.
        const double factor = all.max_norm / (sqrt(*all.square_sum) + 1e-6);
        work.scale = factor > 1 ? 1.f : (float)factor;
    }
    Group group = all.groups[work.tensor.group];
    if (group.lr) group.hyper.lr = *(const float *)group.lr;
    const float step = *(const float *)work.tensor.step + 1.f;
    const double *norms = TRUST ? all.norms + 2 * work.number : nullptr;
    work.scalars = prepare(group.hyper, step, norms ? norms[0] : 0, norms ? norms[1] : 0);
    work.seed = mixed(all.seed ^ mixed((u32)work.number ^ mixed((u32)step)));
}

// Fills ``work`` for this block, for the gradient alone or for an update; false where there is nothing to do.
DEVICE bool begin(const Arguments &all, Work &work, bool updates) {
    const Chunk chunk = all.chunks[blockIdx.x];
    const u64 gradient = all.gradients[chunk.tensor];
    if (threadIdx.x == 0 && gradient) {
        work.tensor = all.tensors[chunk.tensor];
        work.gradient = gradient;
        work.number = chunk.tensor;
        work.first = (i64)chunk.number * all.chunk_size;
        const i64 left = work.tensor.size - work.first;
        work.count = left < all.chunk_size ? (int)left : all.chunk_size;
        work.skipped = misaligned(work);
        work.runs = work.skipped < 0 || work.skipped > work.count ? 0 : (work.count - work.skipped) / RUN;
        work.unscale = all.grad_scale ? *all.grad_scale : 1.f;
        work.scale = 1.f;
        work.max_value = 0.f;
        if (updates) begin_update(all, work);
    }
    __syncthreads();
    return gradient != 0;
}

// Calls ``run`` with the place of each run of this thread, and ``single`` with that of each other element.
template <typename Runs, typename Singles> DEVICE void walk(const Work &work, Runs run, Singles single) {
    for (int i = threadIdx.x; i < work.runs; i += blockDim.x) run(work.first + work.skipped + (i64)i * RUN);
    const int singles = work.count - work.runs * RUN;
    for (int i = threadIdx.x; i < singles; i += blockDim.x)
        single(work.first + (work.runs && i >= work.skipped ? i + work.runs * RUN : i));
}

// True in all threads of the block that comes last, when what the others wrote can be read.
DEVICE bool is_last(u32 *arrived) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        if (last) *arrived = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

template <int COUNT> DEVICE void update_at(const Work &work, i64 at) {
    Elements<COUNT> elements;
    elements.fetch_from(work, at);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) elements.update_one(i, work.scalars);
    elements.store_to(work, at);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) update_kernel(const Arguments all) {
    __shared__ Work work;
    if (all.found_inf && *all.found_inf != 0.f) return;
    if (begin(all, work, true))
        walk(work, [&](i64 at) { update_at<RUN>(work, at); }, [&](i64 at) { update_at<1>(work, at); });
    // Steps are counted when nobody reads them any more.
    if (is_last(all.arrived))
        for (int t = threadIdx.x; t < all.tensor_count; t += blockDim.x)
            if (all.gradients[t]) *(float *)all.tensors[t].step += 1.f;
}
