#include "gate.h"

#include <omp.h>

#include <algorithm>
#include <climits>
#include <cmath>

#include "powers.h"
#include "scratch.h"
#include "vectors.h"

namespace {

constexpr int64_t kWorthATeam = 16384;  // logits; waking a thread and waiting for it costs a microsecond or two
constexpr int32_t kTaken = INT_MIN;       // below the key of minus infinity
constexpr float kEpsilon = 1e-20f;        // saves scores that are all zero from 0 / 0

// Integers in the order of floats: those of negative ones sort the other way round. A NaN is the largest.
__m512i keys_of(__m512 x) {
    const __m512i bits = _mm512_castps_si512(_mm512_add_ps(x, _mm512_setzero_ps()));  // -0 becomes 0
    const __m512i flip = _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(INT_MAX));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_xor_si512(bits, flip), nan, _mm512_set1_epi32(INT_MAX));
}

// Takes the first of the largest of `count` (a multiple of 16) keys.
int64_t take_largest(int32_t* keys, int64_t count) {
    __m512i largest = _mm512_load_si512(keys);
    for (int64_t i = 16; i < count; i += 16) largest = _mm512_max_epi32(largest, _mm512_load_si512(keys + i));
    const __m512i wanted = _mm512_set1_epi32(_mm512_reduce_max_epi32(largest));
    int64_t i = 0;
    __mmask16 found;
    while (!(found = _mm512_cmpeq_epi32_mask(_mm512_load_si512(keys + i), wanted))) i += 16;
    i += __builtin_ctz(found);
    keys[i] = kTaken;
    return i;
}

// One token's numbers, each padded to a multiple of 16.
struct Row {
    float* scores_E;
    float* choice_E;
    int32_t* keys_E;
    int32_t* keys_G;
};

void score(const Gate& gate, const Logits& logits, int64_t token, float* scores_E) {
    const int64_t count = gate.num_experts, first = token * count;
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t e = 0; e < count; e += 16) {
        const __mmask16 mask = lanes(count - e);
        const __m512 x = logits.fp32_TE ? _mm512_maskz_loadu_ps(mask, logits.fp32_TE + first + e)
                                        : load_bf16(logits.bf16_TE + first + e, mask);
        largest = _mm512_mask_max_ps(largest, mask, largest, x);
        _mm512_store_ps(scores_E + e, x);
    }
    if (gate.sigmoid) {
        const __m512 one = _mm512_set1_ps(1.f);
        for (int64_t e = 0; e < count; e += 16) {
            const __m512 negated = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_load_ps(scores_E + e));
            _mm512_store_ps(scores_E + e, _mm512_div_ps(one, _mm512_add_ps(one, exp_16(negated))));
        }
        return;
    }
    const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t e = 0; e < count; e += 16) {
        const __m512 power = exp_16(_mm512_sub_ps(_mm512_load_ps(scores_E + e), maximum));
        sum = _mm512_mask_add_ps(sum, lanes(count - e), sum, power);
        _mm512_store_ps(scores_E + e, power);
    }
    const __m512 total = _mm512_set1_ps(sum_of(sum));
    for (int64_t e = 0; e < count; e += 16)
        _mm512_store_ps(scores_E + e, _mm512_div_ps(_mm512_load_ps(scores_E + e), total));
}

void make_keys(const Gate& gate, const float* bias_E, const Row& row) {
    for (int64_t e = 0; e < gate.num_experts; e += 16) {
        const __mmask16 mask = lanes(gate.num_experts - e);
        __m512 choice = _mm512_load_ps(row.scores_E + e);
        if (bias_E) choice = _mm512_add_ps(choice, _mm512_maskz_loadu_ps(mask, bias_E + e));
        _mm512_store_ps(row.choice_E + e, choice);
        _mm512_store_si512(row.keys_E + e, _mm512_mask_mov_epi32(_mm512_set1_epi32(kTaken), mask, keys_of(choice)));
    }
}

// The sum of the two best choices of a group; they are found by their keys, so that a NaN is among them.
float group_sum(const Row& row, int64_t begin, int64_t end) {
    int64_t best = begin, second = begin + 1;
    if (row.keys_E[second] > row.keys_E[best]) std::swap(best, second);
    for (int64_t e = begin + 2; e < end; ++e) {
        if (row.keys_E[e] > row.keys_E[best]) {
            second = best;
            best = e;
        } else if (row.keys_E[e] > row.keys_E[second]) {
            second = e;
        }
    }
    return row.choice_E[best] + row.choice_E[second];
}

// Leaves the experts of the best groups only.
void drop_groups(const Gate& gate, const Row& row) {
    const int64_t size = gate.num_experts / gate.num_groups, padded = (gate.num_groups + 15) / 16 * 16;
    std::fill_n(row.keys_G, padded, kTaken);
    for (int64_t g = 0; g < gate.num_groups; ++g) {
        const __m512 sum = _mm512_set1_ps(group_sum(row, g * size, (g + 1) * size));
        row.keys_G[g] = _mm_cvtsi128_si32(_mm512_castsi512_si128(keys_of(sum)));
    }
    for (int64_t k = 0; k < gate.top_groups; ++k) take_largest(row.keys_G, padded);
    for (int64_t g = 0; g < gate.num_groups; ++g)
        if (row.keys_G[g] != kTaken) std::fill_n(row.keys_E + g * size, size, kTaken);
}

void choose(const Gate& gate, const Row& row, int64_t* ids_K, float* weights_K) {
    const int64_t padded = (gate.num_experts + 15) / 16 * 16;
    float sum = 0;
    for (int64_t k = 0; k < gate.top_k; ++k) {
        ids_K[k] = take_largest(row.keys_E, padded);
        weights_K[k] = row.scores_E[ids_K[k]];
        sum += weights_K[k];
    }
    const float divisor = gate.renormalize ? sum + kEpsilon : 1.f;
    for (int64_t k = 0; k < gate.top_k; ++k) weights_K[k] = weights_K[k] / divisor * gate.scaling;
}

}  // namespace

void route(const Gate& gate, const Logits& logits, const float* bias_E, int64_t tokens, int64_t* ids_TK,
           float* weights_TK, int threads) {
#pragma omp parallel num_threads(threads) if (tokens * gate.num_experts >= kWorthATeam)
    route_by_team(gate, logits, bias_E, tokens, ids_TK, weights_TK);
}

void route_by_team(const Gate& gate, const Logits& logits, const float* bias_E, int64_t tokens, int64_t* ids_TK,
                   float* weights_TK) {
    const int64_t experts = (gate.num_experts + 15) / 16 * 16, groups = (gate.num_groups + 15) / 16 * 16;
    static thread_local Scratch scratch;
    float* memory = scratch.floats(3 * experts + groups);
    auto* keys = reinterpret_cast<int32_t*>(memory + 2 * experts);
    const Row row = {memory, memory + experts, keys, keys + experts};
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
        score(gate, logits, t, row.scores_E);
        make_keys(gate, bias_E, row);
        if (gate.num_groups > 1) drop_groups(gate, row);
        choose(gate, row, ids_TK + t * gate.top_k, weights_TK + t * gate.top_k);
    }
}
