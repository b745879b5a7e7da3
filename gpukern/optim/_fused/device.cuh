// What multi_tensor.cuh needs of a GPU.

#define DEVICE __device__ __forceinline__

// As PTX: pointers that come out of a table are not known to be global, and would be loaded more slowly. What is stored
// is not read again.
DEVICE void load16(unsigned int *to, unsigned long long from) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(from));
}
DEVICE void store16(unsigned long long to, const unsigned int *from) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]));
}
DEVICE unsigned int load4(unsigned long long from) {
    unsigned int x;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}
DEVICE unsigned int load2(unsigned long long from) {
    unsigned int x;
    asm volatile("ld.global.u16 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}
DEVICE void store4(unsigned long long to, unsigned int x) {
    asm volatile("st.global.u32 [%0], %1;" :: "l"(to), "r"(x));
}
DEVICE void store2(unsigned long long to, unsigned int x) {
    asm volatile("st.global.u16 [%0], %1;" :: "l"(to), "r"(x));
}

// Two numbers in a word, the first in its low half.
DEVICE void halves_to_floats(unsigned int pair, float &low, float &high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(pair));
}
// Both at once where there is such an instruction.
#if __CUDA_ARCH__ >= 800
DEVICE unsigned int floats_to_halves(float low, float high) {
    unsigned int pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
DEVICE unsigned int floats_to_bfloats(float low, float high) {
    unsigned int pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
DEVICE unsigned int floats_to_halves(float low, float high) {
    unsigned int pair;
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(pair) : "f"(low), "f"(high));
    return pair;
}
DEVICE unsigned int float_to_bfloat(float x) {
    const unsigned int bits = __float_as_uint(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
DEVICE unsigned int floats_to_bfloats(float low, float high) {
    return float_to_bfloat(low) | float_to_bfloat(high) << 16;
}
#endif
