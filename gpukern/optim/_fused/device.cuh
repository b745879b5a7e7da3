// What multi_tensor.cuh needs of a GPU.

#define DEVICE __device__ __forceinline__

// As PTX: pointers that come out of a table are not known to be global, and would be loaded more slowly.
DEVICE void load16(void *to, const void *from) {
    unsigned int *word = (unsigned int *)to;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3]) : "l"(from));
}
DEVICE void store16(void *to, const void *from) {
    const unsigned int *word = (const unsigned int *)from;
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
}
DEVICE float half_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
DEVICE unsigned short float_to_half(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
