// All parameters of one device and one combination of dtypes, updated in one launch.
//
// What source.py puts before this: PARAMETER, GRADIENT and STATE (float, Half or BFloat16), MASTER, STOCHASTIC and
// TRUST, STATES (their number), GRADIENTS (pointers that travel by value), RUN (elements that fill 16 bytes of the
// narrowest tensor), THREADS and RESIDENT, Hyper, Scalars, prepare(), update() and measure(); and device.cuh, for
// NVRTC, or host.h, for a CPU.

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

// ---- numbers of 16 bits, without the toolkit's headers: two of them in a word ----

DEVICE float as_float(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
DEVICE u32 as_bits(float x) { u32 bits; memcpy(&bits, &x, 4); return bits; }

// Elements of a word.
template <typename T> constexpr int EACH = 4 / sizeof(T);

DEVICE void unpack(float *to, u32 word, float) { *to = as_float(word); }
DEVICE void unpack(float *to, u32 word, Half) { halves_to_floats(word, to[0], to[1]); }
DEVICE void unpack(float *to, u32 word, BFloat16) {
    to[0] = as_float(word << 16);
    to[1] = as_float(word & 0xffff0000u);
}

// Rounded to the nearest, of two equally near to the even one.
DEVICE u32 packed(float only, float, float) { return as_bits(only); }
DEVICE u32 packed(float low, float high, Half) { return floats_to_halves(low, high); }
DEVICE u32 packed(float low, float high, BFloat16) { return floats_to_bfloats(low, high); }

// To a bfloat16, up as often as what is cut off is large. Of a number that random bits could carry to infinity, the
// nearest.
DEVICE u32 rounded_at_random(float x, u32 random) {
    const u32 bits = as_bits(x);
    return (bits & 0x7fffffffu) < 0x7f7f0000u ? (bits + (random & 0xffffu)) >> 16 : floats_to_bfloats(x, 0.f);
}

// A hash of 32 bits in which every bit of the result depends on every bit of x (Wellons, "Prospecting for hash
// functions", 2018).
DEVICE u32 mixed(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// ---- elements: one, or a run of whole 16 bytes of every tensor ----

// ``AGREE``: in every tensor a run begins at a multiple of 16 bytes. Else each is asked; elements of one that does not
// go one by one, and the others' at once nevertheless.
template <int COUNT, bool AGREE> DEVICE bool goes_at_once(u64 place) { return COUNT > 1 && (AGREE || place % 16 == 0); }

template <typename T, bool AGREE, int COUNT> DEVICE void fetch(float (&to)[COUNT], u64 tensor, i64 index) {
    const u64 place = tensor + (u64)index * sizeof(T);
    if constexpr (COUNT < EACH<T>) {
        float some[EACH<T>];
        unpack(some, load2(place), T());
        to[0] = some[0];
    } else {
        constexpr int WORDS = COUNT / EACH<T>;
        u32 words[WORDS];
        if (goes_at_once<COUNT, AGREE>(place)) {
#pragma unroll
            for (int word = 0; word + 4 <= WORDS; word += 4) load16(words + word, place + 4 * word);
        } else {
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                const u64 at = place + 4 * word;
                words[word] = EACH<T> == 1 ? load4(at) : load2(at) | load2(at + 2) << 16;
            }
        }
#pragma unroll
        for (int word = 0; word < WORDS; ++word) unpack(to + word * EACH<T>, words[word], T());
    }
}

// ``word_of(i)`` is the one that begins with element i.
template <typename T, int COUNT, bool AGREE, typename Word> DEVICE void put(u64 tensor, i64 index, Word word_of) {
    const u64 place = tensor + (u64)index * sizeof(T);
    if constexpr (COUNT < EACH<T>) {
        store2(place, word_of(0));
    } else {
        constexpr int WORDS = COUNT / EACH<T>;
        u32 words[WORDS];
#pragma unroll
        for (int word = 0; word < WORDS; ++word) words[word] = word_of(word * EACH<T>);
        if (goes_at_once<COUNT, AGREE>(place)) {
#pragma unroll
            for (int word = 0; word + 4 <= WORDS; word += 4) store16(place + 4 * word, words + word);
        } else {
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                const u64 at = place + 4 * word;
                if (EACH<T> == 1) {
                    store4(at, words[word]);
                } else {
                    store2(at, words[word]);
                    store2(at + 2, words[word] >> 16);
                }
            }
        }
    }
}

template <typename T, bool AGREE, int COUNT>
DEVICE void put_rounded(const float (&from)[COUNT], u64 tensor, i64 index) {
    put<T, COUNT, AGREE>(tensor, index, [&](int i) { return packed(from[i], from[i + 1 < COUNT ? i + 1 : i], T()); });
}

// What a chunk is, and what its block knows of it.
struct Work {
    Tensor tensor;
    u64 gradient;
    i64 first;
    int number, count, skipped, runs;
    bool agree;
    float scale, unscale, max_value;
    u32 seed;
    Scalars scalars;
};

template <int COUNT, bool AGREE> struct Elements {
    static constexpr int SIZE = COUNT;
    float p[COUNT], g[COUNT], states[STATES > 0 ? STATES : 1][COUNT];

    DEVICE void fetch_from(const Work &work, i64 at) {
        if (MASTER)
            fetch<float, AGREE>(p, work.tensor.master, at);
        else
            fetch<PARAMETER, AGREE>(p, work.tensor.parameter, at);
#pragma unroll
        for (int s = 0; s < STATES; ++s)
            if (work.tensor.states[s]) fetch<STATE, AGREE>(states[s], work.tensor.states[s], at);
        fetch_gradient(work, at);
    }

    DEVICE void fetch_gradient(const Work &work, i64 at) { fetch<GRADIENT, AGREE>(g, work.gradient, at); }

    // As the rule sees it.
    DEVICE void finish_gradient(const Work &work) {
        // Rarely any of the three, and a division by 1 would cost as much as a fifth of an update.
        if (work.unscale != 1.f) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) g[i] /= work.unscale;
        }
        if (work.scale != 1.f) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) g[i] *= work.scale;
        }
        if (work.max_value > 0.f) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                // Comparisons with a NaN are false: it stays.
                if (g[i] > work.max_value) g[i] = work.max_value;
                if (g[i] < -work.max_value) g[i] = -work.max_value;
            }
        }
    }

    DEVICE void store_to(const Work &work, i64 at) const {
        if (MASTER) put_rounded<float, AGREE>(p, work.tensor.master, at);
        if (STOCHASTIC && !MASTER)
            put<PARAMETER, COUNT, AGREE>(work.tensor.parameter, at, [&](int i) {
                return at_random(work, i, at) | (i + 1 < COUNT ? at_random(work, i + 1, at) << 16 : 0);
            });
        else
            put_rounded<PARAMETER, AGREE>(p, work.tensor.parameter, at);
#pragma unroll
        for (int s = 0; s < STATES; ++s)
            if (work.tensor.states[s]) put_rounded<STATE, AGREE>(states[s], work.tensor.states[s], at);
    }

    DEVICE u32 at_random(const Work &work, int i, i64 at) const {
        return rounded_at_random(p[i], mixed(work.seed ^ mixed((u32)(at + i))));
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

template <typename T> DEVICE int starts_at_16_bytes(u64 place, int skipped) {
    return place == 0 || (place + (u64)skipped * sizeof(T)) % 16 == 0;
}

// After how many elements the runs begin: where all tensors are aligned, or as many of them as can be. All chunks of a
// tensor begin alike.
DEVICE void align(Work &work) {
    constexpr int ALL = 2 + MASTER + STATES;
    int most = -1;
    for (int skipped = 0; skipped < RUN; ++skipped) {
        int aligned = starts_at_16_bytes<PARAMETER>(work.tensor.parameter, skipped) +
                      starts_at_16_bytes<GRADIENT>(work.gradient, skipped);
        if (MASTER) aligned += starts_at_16_bytes<float>(work.tensor.master, skipped);
        for (int s = 0; s < STATES; ++s) aligned += starts_at_16_bytes<STATE>(work.tensor.states[s], skipped);
        if (aligned > most) {
            most = aligned;
            work.skipped = skipped;
        }
    }
    work.agree = most == ALL;
    work.runs = work.skipped > work.count ? 0 : (work.count - work.skipped) / RUN;
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
        align(work);
        work.unscale = all.grad_scale ? *all.grad_scale : 1.f;
        work.scale = 1.f;
        work.max_value = 0.f;
        if (updates) begin_update(all, work);
    }
    __syncthreads();
    return gradient != 0;
}

// Runs of this thread, as many at once as ``body`` says: all are on their way before the first is needed.
template <bool AGREE, typename Body> DEVICE void walk_runs(const Work &work, Body &body) {
    const int step = blockDim.x;
    for (int i = threadIdx.x; i < work.runs; i += Body::TOGETHER * step) {
        Elements<RUN, AGREE> elements[Body::TOGETHER];
        const i64 at = work.first + work.skipped;
#pragma unroll
        for (int k = 0; k < Body::TOGETHER; ++k)
            if (k == 0 || i + k * step < work.runs) body.fetch(elements[k], work, at + (i64)(i + k * step) * RUN);
#pragma unroll
        for (int k = 0; k < Body::TOGETHER; ++k)
            if (k == 0 || i + k * step < work.runs) body.take(elements[k], work, at + (i64)(i + k * step) * RUN);
    }
}

// Has ``body`` fetch and take each run of this thread, and each other element.
template <typename Body> DEVICE void walk(const Work &work, Body &body) {
    if (work.agree)
        walk_runs<true>(work, body);
    else
        walk_runs<false>(work, body);
    const int singles = work.count - work.runs * RUN;
    for (int i = threadIdx.x; i < singles; i += blockDim.x) {
        const i64 at = work.first + (work.runs && i >= work.skipped ? i + work.runs * RUN : i);
        Elements<1, true> element;
        body.fetch(element, work, at);
        body.take(element, work, at);
    }
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

struct Update {
    static constexpr int TOGETHER = 1;

    template <typename E> DEVICE void fetch(E &some, const Work &work, i64 at) { some.fetch_from(work, at); }

    template <typename E> DEVICE void take(E &some, const Work &work, i64 at) {
        some.finish_gradient(work);
#pragma unroll
        for (int i = 0; i < E::SIZE; ++i) some.update_one(i, work.scalars);
        some.store_to(work, at);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) update_kernel(const Arguments all) {
    __shared__ Work work;
    if (all.found_inf && *all.found_inf != 0.f) return;
    Update update;
    if (begin(all, work, true)) walk(work, update);
    // Steps are counted when nobody reads them any more.
    if (is_last(all.arrived))
        for (int t = threadIdx.x; t < all.tensor_count; t += blockDim.x)
            if (all.gradients[t]) *(float *)all.tensors[t].step += 1.f;
}
