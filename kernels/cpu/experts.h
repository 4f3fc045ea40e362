// A mixture of SwiGLU experts in one call: rows are sorted by slot, read where they lie, multiplied by their experts'
// weights and summed up per token.
//
// An expert is packed as two weights (panels.h) one behind the other. The first one's panels hold 32 columns of the gate and
// the same 32 of the up projection, so that silu(gate) * up is taken while both are in registers; the last panel may hold
// 16 of each. The second is the down projection.
#pragma once

#include <cstdint>

#include "tile.h"

struct ExpertSize {
    int64_t model_width, width;

    int64_t gate_up_columns() const { return 2 * padded_columns(width); }
    int64_t gate_up_elements() const { return packed_size(gate_up_columns(), model_width); }
    int64_t row_bytes() const { return 2 * (width + model_width); }  // hidden and finished
    int64_t elements() const { return gate_up_elements() + packed_size(model_width, width); }
};

// gate_up is [2 * width, model_width], gate first; down is [model_width, width].
void pack_expert(const ExpertSize& size, const uint16_t* gate_up, const uint16_t* down, uint16_t* packed);

// The experts of a layer, one packed expert behind the other.
struct Experts {
    ExpertSize size;
    int64_t num_slots;
    const uint16_t* packed;
};

// y[r] = expert(x row r), rounded to bf16, for rows that are sorted by slot; y is [num_rows, model_width]. Rows beyond the
// sum of the counts are left alone.
void apply_experts(const Experts& experts, const Rows& x, const int64_t* count_of_slot, int64_t num_rows, uint16_t* y,
                   int threads);

// y[t] = the sum over k of weights[t, k] * expert slots[t, k] (x row t), whose rows are rounded to bf16 and summed in
// fp32 in the order of k. y is [num_tokens, model_width], slots and weights are [num_tokens, per_token]. Writes how many
// pairs each slot had. False, with nothing computed, if a slot is not in [0, num_slots).
bool mix_experts(const Experts& experts, const Rows& x, int64_t num_tokens, int64_t per_token, const int64_t* slots,
                 const float* weights, uint16_t* y, int64_t* count_of_slot, int threads);

// The same by the team of the parallel region around, all of whose threads call it and leave it together.
bool mix_experts_by_team(const Experts& experts, const Rows& x, int64_t num_tokens, int64_t per_token,
                         const int64_t* slots, const float* weights, uint16_t* y, int64_t* count_of_slot);
