// One piece of the attention of a step: some queries of a sequence over a range of its keys, read where they lie.
//
// Online softmax (Milakov and Gimelshein 2018; chunks of keys as in FlashAttention, Dao et al. 2022): within a segment
// chunk by chunk, then segment by segment. Both stand at fixed positions, so that the bits of a query depend on its
// position and on the keys that it sees, whatever pieces the step was cut into.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention_plan.h"
#include "attention_products.h"

// The tensors of one call. Legend: T tokens, N heads of queries, keys and values, S sequences, B columns of the table,
// Q query heads, W head width, C slabs of a block, b tokens of a block, P rows of sums.
struct AttentionTensors {
    AttentionShape shape;
    uint16_t* qkv_TNW;
    uint16_t* kv_NCbW;
    int block_size;
    const int32_t* block_SB;
    int64_t columns;
    uint16_t* out_TQW;
    float* partials_P;  // rows of `partial_stride` numbers
};

inline int heads_of_token(const AttentionShape& shape) { return shape.heads + 2 * shape.kv_heads; }
// Sums, maximum and sum of the exponentials.
inline int64_t partial_stride(const AttentionShape& shape) { return padded(shape.width) + 16; }

// Writes either the rows of the result, or one row of sums per segment.
void attend(const Piece& piece, const AttentionTensors& tensors);

// The rows of the result from the sums of all their segments.
void join(const Piece& piece, const AttentionTensors& tensors);
