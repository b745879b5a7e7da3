// A GPU played by a CPU: what multi_tensor.cuh needs, blocks one after the other, their threads beside one another.

#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define DEVICE inline
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads, blocks)

using std::memcpy;

struct Index { unsigned int x; };
static thread_local Index threadIdx;
static Index blockIdx, blockDim, gridDim;
static std::unique_ptr<std::barrier<>> together;

static inline void __syncthreads() { if (together) together->arrive_and_wait(); }
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline unsigned int atomicAdd(unsigned int *place, unsigned int value) {
    return __atomic_fetch_add(place, value, __ATOMIC_SEQ_CST);
}

template <typename Word> DEVICE Word loaded(unsigned long long from) {
    Word x;
    memcpy(&x, (const void *)from, sizeof(x));
    return x;
}
template <typename Word> DEVICE void store(unsigned long long to, Word x) { memcpy((void *)to, &x, sizeof(x)); }
DEVICE unsigned int load4(unsigned long long from) { return loaded<unsigned int>(from); }
DEVICE unsigned int load2(unsigned long long from) { return loaded<unsigned short>(from); }
DEVICE void store4(unsigned long long to, unsigned int x) { store(to, x); }
DEVICE void store2(unsigned long long to, unsigned int x) { store(to, (unsigned short)x); }
DEVICE void load16(unsigned int *to, unsigned long long from) {
    if (from % 16) __builtin_trap();  // as on the device
    memcpy(to, (const void *)from, 16);
}
DEVICE void store16(unsigned long long to, const unsigned int *from) {
    if (to % 16) __builtin_trap();
    memcpy((void *)to, from, 16);
}

// By powers of two that are exact, and one rounding of the processor's own.
DEVICE float half_to_float(unsigned short bits) {
    const unsigned int magnitude = bits & 0x7fffu, sign = (unsigned int)(bits & 0x8000u) << 16;
    unsigned int wide = magnitude << 13;
    float x;
    if (magnitude >= 0x7c00u) {
        wide |= 0x7f800000u;  // infinity or NaN
        memcpy(&x, &wide, 4);
    } else {
        memcpy(&x, &wide, 4);
        x *= 0x1p112f;
    }
    memcpy(&wide, &x, 4);
    wide |= sign;
    memcpy(&x, &wide, 4);
    return x;
}
DEVICE unsigned short float_to_half(float x) {
    unsigned int bits;
    memcpy(&bits, &x, 4);
    const unsigned short sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7fff;
    if (bits >= 0x477ff000u) return sign | 0x7c00;  // from halfway beyond the largest
    if (bits < 0x38800000u) {
        // Subnormal: added to a number whose last bit is worth theirs, it is rounded to that.
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return sign | (unsigned short)(bits - 0x3f000000u);
    }
    bits += 0xfffu + (bits >> 13 & 1u);
    return sign | (unsigned short)((bits - 0x38000000u) >> 13);
}

DEVICE unsigned int float_to_bfloat(float x) {
    unsigned int bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

DEVICE void halves_to_floats(unsigned int pair, float &low, float &high) {
    low = half_to_float(pair & 0xffffu);
    high = half_to_float(pair >> 16);
}
DEVICE unsigned int floats_to_halves(float low, float high) {
    return float_to_half(low) | (unsigned int)float_to_half(high) << 16;
}
DEVICE unsigned int floats_to_bfloats(float low, float high) {
    return float_to_bfloat(low) | float_to_bfloat(high) << 16;
}

template <typename Kernel, typename Given>
static void run_on_host(Kernel kernel, unsigned int blocks, unsigned int threads, const Given *given) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    gridDim.x = blocks;
    blockDim.x = threads;
    together.reset(threads > 1 ? new std::barrier<>(threads) : nullptr);
    const auto thread = [&](unsigned int number) {
        threadIdx.x = number;
        for (unsigned int block = 0; block < blocks; ++block) {
            // One of them says which block it is, while no other reads it.
            if (number == 0) blockIdx.x = block;
            __syncthreads();
            kernel(*given);
            __syncthreads();
        }
    };
    std::vector<std::thread> others;
    for (unsigned int number = 1; number < threads; ++number) others.emplace_back(thread, number);
    thread(0);
    for (auto &other : others) other.join();
    together.reset();
}
