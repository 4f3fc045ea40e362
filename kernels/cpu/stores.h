// Stores of whole vectors without a mask: with one, Zen 4 takes tens of cycles and forwards nothing to a later load.
#pragma once

#include <immintrin.h>

#include <cstdint>

inline void put_bf16(uint16_t* to, __m256bh x, __mmask16 mask) {
    if (mask == 0xffff)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)x);
    else
        _mm256_mask_storeu_epi16(to, mask, (__m256i)x);
}

// Rounded to nearest, ties to even.
inline void put_rounded(uint16_t* to, __m512 x, __mmask16 mask) { put_bf16(to, _mm512_cvtneps_pbh(x), mask); }

// Pairs of bf16.
inline void put_pairs(uint16_t* to, __m512i x, __mmask16 mask) {
    if (mask == 0xffff)
        _mm512_storeu_si512(to, x);
    else
        _mm512_mask_storeu_epi32(to, mask, x);
}
