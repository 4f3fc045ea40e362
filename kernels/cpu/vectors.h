// Vectors of 16 fp32 numbers: what several kernels do with them.
#pragma once

#include <immintrin.h>

#include <cstdint>

// The first `count` lanes, all of them from 16 on.
inline __mmask16 lanes(int64_t count) {
    return count >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 load_bf16(const uint16_t* from, __mmask16 mask = 0xffff) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}
