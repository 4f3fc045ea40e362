#include "attention_products.h"

#include <algorithm>
#include <array>
#include <utility>

#include "vectors.h"

namespace {

// A square of 32-bit numbers: 16 pairs of 16 keys.
void transpose_square(const uint16_t* const* row_16, int first_pair, int pairs, uint32_t* to_pL) {
    const __mmask16 mask = lanes(pairs);
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_epi32(mask, row_16[i] + 2 * first_pair);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i even_low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        const __m512i even_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
        b[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        b[8 + i] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        b[12 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
    for (int i = 0; i < 16; ++i)
        if (i < pairs) _mm512_storeu_si512(to_pL + i * kChunk, b[i]);
}

template <int kRows, int kVectors>
void scores(const uint16_t* const* q_R, const uint32_t* keys_pL, int pairs, float factor, float* scores_RL) {
    __m512 sum[kRows][kVectors];
    const uint16_t* q[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        q[r] = q_R[r];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int pair = 0; pair < pairs; ++pair) {
        __m512bh key[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) key[v] = (__m512bh)_mm512_loadu_si512(keys_pL + pair * kChunk + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            int32_t both;
            __builtin_memcpy(&both, q[r] + 2 * pair, sizeof both);
            const __m512bh query = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], query, key[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            _mm512_storeu_ps(scores_RL + r * kChunk + 16 * v, _mm512_mul_ps(sum[r][v], _mm512_set1_ps(factor)));
}

// kUnits times 32 numbers of the heads, from `column` on; of the last unit those in `mask`.
template <int kRows, int kUnits>
void values(const float* probs_RL, const uint16_t* const* row_L, int begin, int end, int column, __mmask32 mask,
            int stride, float* sums_RW) {
    __m512 sum[kRows][2 * kUnits];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int u = 0; u < 2 * kUnits; ++u) sum[r][u] = _mm512_loadu_ps(sums_RW + r * stride + column + 16 * u);
    for (int key = begin; key < end; ++key) {
        const uint16_t* row = row_L[key] + column;
        __m512 value[2 * kUnits];
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u) {
            const __m512i bits = _mm512_maskz_loadu_epi16(u + 1 < kUnits ? ~0u : mask, row + 32 * u);
            value[2 * u] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
            value[2 * u + 1] = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const __m512 prob = _mm512_set1_ps(probs_RL[r * kChunk + key]);
#pragma GCC unroll 8
            for (int u = 0; u < 2 * kUnits; ++u) sum[r][u] = _mm512_fmadd_ps(prob, value[u], sum[r][u]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int u = 0; u < 2 * kUnits; ++u) _mm512_storeu_ps(sums_RW + r * stride + column + 16 * u, sum[r][u]);
}

// Compiled for every number of rows up to kMaxRows.
using Scores = decltype(&scores<1, 1>);
using Values = decltype(&values<1, 1>);
template <int kVectors, int... I> constexpr std::array<Scores, kMaxRows> scores_of(std::integer_sequence<int, I...>) {
    return {scores<I + 1, kVectors>...};
}
template <int kUnits, int... I> constexpr std::array<Values, kMaxRows> values_of(std::integer_sequence<int, I...>) {
    return {values<I + 1, kUnits>...};
}
using Each = std::make_integer_sequence<int, kMaxRows>;
constexpr std::array kScores = {scores_of<1>(Each()), scores_of<2>(Each()), scores_of<3>(Each()), scores_of<4>(Each())};
constexpr std::array kValues = {values_of<1>(Each()), values_of<2>(Each())};

}  // namespace

void transpose_keys(const uint16_t* const* row_L, int num_keys, int width, uint32_t* keys_pL) {
    for (int pair = 0; pair < width / 2; pair += 16)
        for (int key = 0; key < num_keys; key += 16)
            transpose_square(row_L + key, pair, width / 2 - pair, keys_pL + pair * kChunk + key);
}

void multiply_keys(const uint16_t* const* q_R, int rows, const uint32_t* keys_pL, int num_keys, int width, float factor,
                   float* scores_RL) {
    kScores[(num_keys - 1) / 16][rows - 1](q_R, keys_pL, width / 2, factor, scores_RL);
}

void add_values(const float* probs_RL, int rows, const uint16_t* const* row_L, int begin, int end, int width,
                float* sums_RW) {
    for (int column = 0; column < width; column += 64) {
        const int units = std::min(2, (width - column + 31) / 32), last = width - column - 32 * (units - 1);
        const __mmask32 mask = last >= 32 ? ~0u : (1u << last) - 1;
        kValues[units - 1][rows - 1](probs_RL, row_L, begin, end, column, mask, padded(width), sums_RW);
    }
}
