// Which experts a token needs, and with what weights.
#pragma once

#include <cstdint>

struct Gate {
    int64_t num_experts, top_k;
    bool sigmoid;  // a softmax over all experts otherwise
    int64_t num_groups, top_groups;  // of contiguous experts, at least 2 each; 1 and 1: every expert may be chosen
    bool renormalize;
    float scaling;
};

// Logits in fp32 or bf16: exactly one of the two is not null.
struct Logits {
    const float* fp32_TE;
    const uint16_t* bf16_TE;
};

// ids_TK, best first, and weights_TK. `bias_E` raises the scores for the choice only; it may be null. Among equals the
// smaller id comes first, of groups too, and a NaN is above all numbers. Sums are added up in 16 lanes in the order of
// the experts, so that a token's bits depend on its own logits only.
void route(const Gate& gate, const Logits& logits, const float* bias_E, int64_t tokens, int64_t* ids_TK,
           float* weights_TK, int threads);

// The same by the team of the parallel region around, all of whose threads call it and leave it together.
void route_by_team(const Gate& gate, const Logits& logits, const float* bias_E, int64_t tokens, int64_t* ids_TK,
                   float* weights_TK);
