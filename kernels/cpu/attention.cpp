#include "attention.h"

#include <omp.h>

#include <algorithm>

#include "heads.h"
#include "scratch.h"

namespace {

// Where a head of a token's key or value lies in the cache; slabs are key heads, then value heads.
uint16_t* cached(const AttentionTensors& tensors, int64_t block, int slab, int offset) {
    const int64_t slabs = 2 * tensors.shape.kv_heads;
    return tensors.kv_NCbW + ((block * slabs + slab) * tensors.block_size + offset) * tensors.shape.width;
}

void place_head(const AttentionTensors& tensors, const Turn& turn, int64_t slot, int token, int head) {
    const AttentionShape& shape = tensors.shape;
    const int64_t block = slot / tensors.block_size;
    const int slab = head - shape.heads;
    uint16_t* x_W = tensors.qkv_TNW + (static_cast<int64_t>(token) * heads_of_token(shape) + head) * shape.width;
    const int offset = static_cast<int>(slot - block * tensors.block_size);
    uint16_t* out_W = slab < 0 ? x_W : cached(tensors, block, slab, offset);
    if (slab >= shape.kv_heads) {
        std::copy_n(x_W, shape.width, out_W);
    } else {
        const int64_t row = static_cast<int64_t>(token) * shape.rotary_width;
        const float* weight_W = turn.weight_NW ? turn.weight_NW + head * shape.width : nullptr;
        turn_head(x_W, shape.width, weight_W, turn.eps, turn.cos_TR + row, turn.sin_TR + row, shape.rotary_width,
                  out_W);
    }
}

// Of a block that the step begins, the slots that it does not fill.
void empty(const AttentionTensors& tensors, const Emptied& emptied) {
    const int column = emptied.position / tensors.block_size, offset = emptied.position % tensors.block_size;
    const int64_t block = tensors.block_SB[emptied.span * tensors.columns + column];
    const int count = (tensors.block_size - offset) * tensors.shape.width;
    for (int slab = 0; slab < 2 * tensors.shape.kv_heads; ++slab)
        std::fill_n(cached(tensors, block, slab, offset), count, uint16_t{0});
}

}  // namespace

void paged_attention(const AttentionPlan& plan, const AttentionTensors& tensors, const Turn& turn,
                     const int64_t* slot_T, int num_tokens) {
#pragma omp parallel num_threads(plan.threads)
    paged_attention_by_team(plan, tensors, turn, slot_T, num_tokens);
}

void paged_attention_by_team(const AttentionPlan& plan, const AttentionTensors& tensors, const Turn& turn,
                             const int64_t* slot_T, int num_tokens) {
    AttentionTensors shared = tensors;
    const int heads = heads_of_token(tensors.shape), num_heads = num_tokens * heads;
    const int num_pieces = static_cast<int>(plan.pieces.size()), num_joined = static_cast<int>(plan.joined.size());
    if (num_joined > 0) {
        static thread_local Scratch scratch;  // of whichever thread is first; the team shares it
        float* partials_P = nullptr;
#pragma omp single copyprivate(partials_P)
        partials_P = scratch.floats(plan.num_partials * partial_stride(tensors.shape));
        shared.partials_P = partials_P;
    }
#pragma omp for schedule(static) nowait
    for (size_t i = 0; i < plan.emptied.size(); ++i) empty(shared, plan.emptied[i]);
#pragma omp for schedule(static)
    for (int i = 0; i < num_heads; ++i) place_head(shared, turn, slot_T[i / heads], i / heads, i % heads);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < num_pieces; ++i) attend(plan.pieces[i], shared);
    if (num_joined > 0) {
#pragma omp for schedule(static)
        for (int i = 0; i < num_joined; ++i) join(plan.joined[i], shared);
    }
}
