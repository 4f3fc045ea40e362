// Expert rows on a board: tokens out, rows in, results out, their sum at home.
//
// Legend: T tokens of a rank, D model width, K experts per token, N ranks, L slots of a rank, R rows for this rank's
// slots, P pairs (token, expert) of a rank.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "board.h"

namespace moestro {

// Where a row belongs: pair `pair` (token * K + k) of rank `rank`.
struct Home {
  int32_t rank, pair;
};

inline size_t slots_bytes(int64_t num_pairs) { return (num_pairs * sizeof(int32_t) + 63) / 64 * 64; }

// What a rank's part must hold for its tokens with their slots on the way out, and for its pairs on the way home.
inline size_t bytes_needed(int64_t num_tokens, int64_t k, int64_t row_bytes) {
  return num_tokens * k * (row_bytes + sizeof(int32_t)) + 64;
}

inline void write_tokens(char* part, const char* x_TD, const int64_t* slots_TK, int64_t num_tokens, int64_t k,
                         int64_t row_bytes) {
  auto* slots = reinterpret_cast<int32_t*>(part);
  for (int64_t pair = 0; pair < num_tokens * k; ++pair) slots[pair] = int32_t(slots_TK[pair]);
  memcpy(part + slots_bytes(num_tokens * k), x_TD, num_tokens * row_bytes);
}

// Rows of each slot of this rank, from all ranks' tokens. Returns their sum.
inline int64_t count_rows(const Board& board, uint32_t operation, const std::vector<int64_t>& num_tokens_N, int64_t k,
                          int64_t capacity, int64_t* counts_L) {
  std::fill(counts_L, counts_L + capacity, 0);
  int64_t num_rows = 0;
  for (int rank = 0; rank < board.size(); ++rank) {
    const auto* slots = reinterpret_cast<const int32_t*>(board.part(rank, operation));
    for (int64_t pair = 0; pair < num_tokens_N[rank] * k; ++pair) {
      const int64_t slot = slots[pair] - board.rank() * capacity;
      if (slot < 0 || slot >= capacity) continue;
      ++counts_L[slot];
      ++num_rows;
    }
  }
  return num_rows;
}

// Copies them out, sorted by slot, then by rank, then by pair, and notes where each belongs.
inline void read_rows(const Board& board, uint32_t operation, const std::vector<int64_t>& num_tokens_N, int64_t k,
                      int64_t capacity, int64_t row_bytes, const int64_t* counts_L, char* x_RD, Home* home_R) {
  std::vector<int64_t> next_L(capacity, 0);
  for (int64_t slot = 1; slot < capacity; ++slot) next_L[slot] = next_L[slot - 1] + counts_L[slot - 1];
  for (int rank = 0; rank < board.size(); ++rank) {
    const char* part = board.part(rank, operation);
    const auto* slots = reinterpret_cast<const int32_t*>(part);
    const char* x_TD = part + slots_bytes(num_tokens_N[rank] * k);
    for (int64_t token = 0; token < num_tokens_N[rank]; ++token)
      for (int64_t pair = token * k; pair < (token + 1) * k; ++pair) {
        const int64_t slot = slots[pair] - board.rank() * capacity;
        if (slot < 0 || slot >= capacity) continue;
        const int64_t row = next_L[slot]++;
        memcpy(x_RD + row * row_bytes, x_TD + token * row_bytes, row_bytes);
        home_R[row] = {rank, int32_t(pair)};
      }
  }
}

inline void write_rows(const Board& board, uint32_t operation, const char* y_RD, const Home* home_R, int64_t num_rows,
                       int64_t row_bytes) {
  for (int64_t row = 0; row < num_rows; ++row)
    memcpy(board.part(home_R[row].rank, operation) + home_R[row].pair * row_bytes, y_RD + row * row_bytes, row_bytes);
}

// bfloat16 as torch has it: the upper half of a float, rounded to nearest, ties to even.
struct Bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, Bf16& to) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
}

// The same operations for each element whatever the vector's width: built with -ffp-contract=off, so the bits are those
// of kernels/weighted_sum.py on every processor.
#if defined(__x86_64__) && defined(__GNUC__)
#define MOESTRO_EVERY_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOESTRO_EVERY_WIDTH
#endif

constexpr int64_t kAtOnce = 64;  // elements whose sums are kept in registers

template <typename T>
inline __attribute__((always_inline)) void weighted_sums(const T* y_TKD, const float* weights_TK, int64_t num_tokens,
                                                         int64_t k, int64_t width, T* y_TD) {
  for (int64_t token = 0; token < num_tokens; ++token)
    for (int64_t from = 0; from < width; from += kAtOnce) {
      const int64_t num = std::min(kAtOnce, width - from);
      float sum[kAtOnce];
      for (int64_t i = 0; i < k; ++i) {
        const float weight = weights_TK[token * k + i];
        const T* y_D = y_TKD + (token * k + i) * width + from;
        if (i == 0)
          for (int64_t d = 0; d < num; ++d) sum[d] = widen(y_D[d]) * weight;
        else
          for (int64_t d = 0; d < num; ++d) sum[d] += widen(y_D[d]) * weight;
      }
      for (int64_t d = 0; d < num; ++d) narrow(sum[d], y_TD[token * width + from + d]);
    }
}

// parts[rank][i] for all ranks, added in order of rank.
template <typename T>
inline __attribute__((always_inline)) void sums(const std::vector<const T*>& parts, int64_t num, T* out) {
  for (int64_t from = 0; from < num; from += kAtOnce) {
    const int64_t here = std::min(kAtOnce, num - from);
    float sum[kAtOnce];
    for (int64_t i = 0; i < here; ++i) sum[i] = widen(parts[0][from + i]);
    for (size_t rank = 1; rank < parts.size(); ++rank)
      for (int64_t i = 0; i < here; ++i) sum[i] += widen(parts[rank][from + i]);
    for (int64_t i = 0; i < here; ++i) narrow(sum[i], out[from + i]);
  }
}

#define MOESTRO_SUMS(T)                                                                                            \
  MOESTRO_EVERY_WIDTH inline void weighted_sums_of(const T* y_TKD, const float* weights_TK, int64_t num_tokens,    \
                                                   int64_t k, int64_t width, T* y_TD) {                            \
    weighted_sums(y_TKD, weights_TK, num_tokens, k, width, y_TD);                                                  \
  }                                                                                                                \
  MOESTRO_EVERY_WIDTH inline void sums_of(const std::vector<const T*>& parts, int64_t num, T* out) {               \
    sums(parts, num, out);                                                                                         \
  }
MOESTRO_SUMS(float)
MOESTRO_SUMS(Bf16)
#undef MOESTRO_SUMS

}  // namespace moestro
