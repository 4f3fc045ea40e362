// The product of a few rows with up to 64 columns of a panel, in registers.
//
// Every output is one fp32 accumulator that takes the pairs of inputs in their order. So its bits depend on its row, its
// column of weights and nothing else: not on the other rows or columns of the tile, nor on how a product is cut into
// tiles and shared out among threads.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "panels.h"
#include "rows.h"

constexpr int64_t kTileRows = 6;  // 6 x 4 accumulators, 4 vectors of weights and a broadcast are 29 of 32 registers

// Memory that will be read soon: `lines` cache lines from `next` for every pair of inputs.
struct Ahead {
    const char* next;
    int64_t lines;
};

inline __m512bh pair_broadcast(const uint16_t* pair) {
    uint32_t bits;
    std::memcpy(&bits, pair, 4);
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(bits));
}

inline __m512bh weights_at(const uint16_t* weights) { return (__m512bh)_mm512_loadu_si512(weights); }

// kRows rows times kVectors * 16 columns. `weights` is the first of the columns in the panel's first pair, `step` the
// elements from one pair to the next. Calls done(row, accumulators of that row).
template <int kRows, int kVectors, class Done>
inline __attribute__((always_inline)) void tile(
    const uint16_t* const* row_of, int64_t inputs, const uint16_t* weights, int64_t step, Ahead ahead, Done&& done) {
    const uint16_t* x[kRows];
    __m512 sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
        x[m] = row_of[m];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_setzero_ps();
    }
    const auto add_pair = [&](auto load_pair) __attribute__((always_inline)) {
        __m512bh w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) w[v] = weights_at(weights + 2 * kLanes * v);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const __m512bh a = load_pair(x[m]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], a, w[v]);
        }
    };
    const int64_t whole_pairs = inputs / 2;
    for (int64_t pair = 0; pair < whole_pairs; ++pair) {
        for (int64_t line = 0; line < ahead.lines; ++line, ahead.next += 64) _mm_prefetch(ahead.next, _MM_HINT_T1);
        add_pair([pair](const uint16_t* row) { return pair_broadcast(row + 2 * pair); });
        weights += step;
    }
    if (inputs % 2 != 0)  // the panel's second half of this pair is zero, and nothing lies behind the row's end
        add_pair([inputs](const uint16_t* row) { return (__m512bh)_mm512_set1_epi32(row[inputs - 1]); });
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) done(m, sum[m]);
}

// As many tiles as `count` rows need, of nearly equal height. Calls done(r, accumulators) for rows first ... first + count.
// `ahead_bytes` from `ahead` are what the caller will read next, which may be brought into the L2 cache meanwhile.
template <int kVectors, class Done>
void multiply_rows(const Rows& rows, int64_t first, int64_t count, int64_t inputs, const uint16_t* weights, int64_t step,
                   const void* ahead, int64_t ahead_bytes, Done&& done) {
    const int64_t tiles = (count + kTileRows - 1) / kTileRows;
    // One tile reads as fast as memory delivers by itself, and three and more are slowed down by asking (measured). Two
    // leave memory idle while the second works from the cache: each asks for half of what comes next.
    const int64_t pairs = std::max<int64_t>(1, inputs / 2);
    const int64_t lines = tiles == 2 ? (ahead_bytes / 64 + 2 * pairs - 1) / (2 * pairs) : 0;
    const char* next = static_cast<const char*>(ahead);
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t begin = first + count * t / tiles, end = first + count * (t + 1) / tiles;
        const Ahead part{next + 64 * t * pairs * lines, lines};
        const uint16_t* row_of[kTileRows];
        for (int64_t r = begin; r < end; ++r) row_of[r - begin] = rows.row(r);
        const auto there = [&](int m, const __m512(&sum)[kVectors]) { done(begin + m, sum); };
        switch (end - begin) {
            case 1: tile<1, kVectors>(row_of, inputs, weights, step, part, there); break;
            case 2: tile<2, kVectors>(row_of, inputs, weights, step, part, there); break;
            case 3: tile<3, kVectors>(row_of, inputs, weights, step, part, there); break;
            case 4: tile<4, kVectors>(row_of, inputs, weights, step, part, there); break;
            case 5: tile<5, kVectors>(row_of, inputs, weights, step, part, there); break;
            case 6: tile<6, kVectors>(row_of, inputs, weights, step, part, there); break;
        }
    }
}
