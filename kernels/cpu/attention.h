// Attention of one layer: norm, rotation, cache and product, in one parallel region.
#pragma once

#include "attention_piece.h"
#include "attention_plan.h"

// What is done to queries and keys before they are multiplied. Legend: N query and key heads, W head width, T tokens, R
// rotated width.
struct Turn {
    const float* weight_NW;  // null: no norm
    float eps;
    const float *cos_TR, *sin_TR;
};

// Leaves queries in `tensors.qkv_TNW`, keys and values in the cache at slot_T (block * block size + offset), and the
// result in `tensors.out_TQW`.
void paged_attention(const AttentionPlan& plan, const AttentionTensors& tensors, const Turn& turn,
                     const int64_t* slot_T, int num_tokens);

// The same by the team of the parallel region around, all of whose threads call it and leave it together.
void paged_attention_by_team(const AttentionPlan& plan, const AttentionTensors& tensors, const Turn& turn,
                             const int64_t* slot_T, int num_tokens);
