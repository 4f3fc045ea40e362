// The two products of attention over one chunk of keys, for up to 6 rows (query heads) at once.
//
// Legend: R rows, L keys of a chunk, p pairs of neighbouring numbers of a head, W head width padded to whole 32.
//
// Every element of a result is added up by one chain of additions in the order of the head's numbers, or of the keys:
// its bits do not depend on how many rows share the loads.
#pragma once

#include <cstdint>

#include "attention_plan.h"

constexpr int kMaxRows = 6;

// keys_pL: pair p of key l, from the keys' rows of `width` (even) numbers. Keys beyond the next multiple of 16 above
// `num_keys` are left as they were; row_L points at kChunk readable rows.
void transpose_keys(const uint16_t* const* row_L, int num_keys, int width, uint32_t* keys_pL);

// scores_RL = q k^T * factor, of the first `num_keys` keys, rounded up to a multiple of 16. Rows lie kChunk apart.
void multiply_keys(const uint16_t* const* q_R, int rows, const uint32_t* keys_pL, int num_keys, int width, float factor,
                   float* scores_RL);

// sums_RW += probs v over keys begin .. end - 1. In each 32 sums of a head the even ones stand before the odd.
void add_values(const float* probs_RL, int rows, const uint16_t* const* row_L, int begin, int end, int width,
                float* sums_RW);

inline int padded(int width) { return (width + 31) / 32 * 32; }
