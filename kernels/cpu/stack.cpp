#include "stack.h"

#include <omp.h>

#include <algorithm>

#include "gemm.h"
#include "norms.h"
#include "stores.h"
#include "vectors.h"

namespace {

constexpr int64_t round_up(int64_t elements) { return (elements + 31) / 32 * 32; }  // to 64 bytes

// The widest of every tensor over all layers, laid out one behind the other.
struct Workspace {
    int64_t width = 0, qkv = 0, out = 0, experts = 0, per_token = 0, slots = 0, tokens;

    Workspace(const std::vector<StackLayer>& layers, const StackStep& step) : width(step.width), tokens(step.tokens) {
        for (const StackLayer& layer : layers) {
            qkv = std::max(qkv, layer.qkv.columns);
            out = std::max<int64_t>(out, layer.attention.heads * layer.attention.width);
            experts = std::max(experts, layer.routing.num_experts);
            per_token = std::max(per_token, layer.routing.top_k);
            slots = std::max(slots, layer.experts.num_slots);
        }
    }

    // 64-bit numbers count as four.
    int64_t size() const {
        return 2 * round_up(tokens * width) + round_up(tokens * qkv) + round_up(tokens * out) +
               round_up(tokens * experts) + 2 * round_up(4 * tokens * per_token) + round_up(4 * slots);
    }
};

struct Tensors {
    uint16_t *h_TM, *delta_TM, *qkv_TNW, *out_TQW, *logits_TE;
    int64_t *ids_TK, *slots_TK, *count_L;

    Tensors(const Workspace& of, uint16_t* memory) {
        const auto take = [&](int64_t elements) {
            uint16_t* taken = memory;
            memory += round_up(elements);
            return taken;
        };
        h_TM = take(of.tokens * of.width);
        delta_TM = take(of.tokens * of.width);
        qkv_TNW = take(of.tokens * of.qkv);
        out_TQW = take(of.tokens * of.out);
        logits_TE = take(of.tokens * of.experts);
        ids_TK = reinterpret_cast<int64_t*>(take(4 * of.tokens * of.per_token));
        slots_TK = reinterpret_cast<int64_t*>(take(4 * of.tokens * of.per_token));
        count_L = reinterpret_cast<int64_t*>(take(4 * of.slots));
    }
};

Rows rows_of(const uint16_t* x, int64_t width) { return {x, width, nullptr}; }

void project(const Weight& weight, const uint16_t* x, int64_t inputs, int64_t tokens, uint16_t* y) {
    multiply_by_team(rows_of(x, inputs), tokens, inputs, weight.packed, weight.columns, weight.bias, {y, nullptr});
}

void attend_by_team(const StackLayer& layer, const LayerStep& where, const StackStep& step, const Tensors& t) {
    const AttentionTensors tensors = {layer.attention, t.qkv_TNW,     where.kv_NCbW, where.block_size,
                                      where.block_table_SB, where.columns, t.out_TQW, nullptr};
    const Turn turn = {layer.head_norm_NW, layer.head_eps, step.cos_TR, step.sin_TR};
    paged_attention_by_team(*where.plan, tensors, turn, where.slot_T, static_cast<int>(step.tokens));
}

// Slots of the experts that were chosen; an expert's first, where it has several.
void find_slots_by_team(const int64_t* slot_E, int64_t pairs, const Tensors& t) {
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) t.slots_TK[pair] = slot_E[t.ids_TK[pair]];
}

// out = x + delta, rounded to bf16; out may be x.
void add_by_team(const uint16_t* x_TM, const uint16_t* delta_TM, const StackStep& step, uint16_t* out_TM) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.tokens; ++t) {
        const int64_t row = t * step.width;
        for (int64_t m = 0; m < step.width; m += kLanes) {
            const __mmask16 mask = lanes(step.width - m);
            const __m512 sum = _mm512_add_ps(load_bf16(x_TM + row + m, mask), load_bf16(delta_TM + row + m, mask));
            put_rounded(out_TM + row + m, sum, mask);
        }
    }
}

// One layer, whose result is left in delta_TM; before the first layer there is none to add.
bool run_layer(const StackLayer& layer, const LayerStep& where, const StackStep& step, const Tensors& t, bool is_first) {
    const int64_t tokens = step.tokens, width = step.width, per_token = layer.routing.top_k;
    add_rms_norm_by_team(step.x_TM, is_first ? nullptr : t.delta_TM, layer.attention_norm_M, layer.eps, tokens, width,
                         t.h_TM);
    project(layer.qkv, t.h_TM, width, tokens, t.qkv_TNW);
    attend_by_team(layer, where, step, t);
    project(layer.out, t.out_TQW, layer.attention.heads * layer.attention.width, tokens, t.delta_TM);
    add_rms_norm_by_team(step.x_TM, t.delta_TM, layer.mlp_norm_M, layer.eps, tokens, width, t.h_TM);
    project(layer.gate, t.h_TM, width, tokens, t.logits_TE);
    route_by_team(layer.routing, {nullptr, t.logits_TE}, layer.routing_bias_E, tokens, t.ids_TK, where.weights_TK);
    find_slots_by_team(where.slot_E, tokens * per_token, t);
    if (!mix_experts_by_team(layer.experts, rows_of(t.h_TM, width), tokens, per_token, t.slots_TK, where.weights_TK,
                             t.delta_TM, t.count_L))
        return false;
#pragma omp single
    for (int64_t slot = 0; slot < layer.experts.num_slots; ++slot) where.rows_L[slot] += t.count_L[slot];
    return true;
}

}  // namespace

int64_t workspace_size(const std::vector<StackLayer>& layers, const StackStep& step) {
    return Workspace(layers, step).size();
}

bool run_stack(const std::vector<StackLayer>& layers, const std::vector<LayerStep>& steps, const StackStep& step,
               uint16_t* workspace, int threads) {
    const Tensors tensors(Workspace(layers, step), workspace);
    bool ok = true;
#pragma omp parallel num_threads(threads)
    {
        bool going_on = true;
        for (size_t l = 0; l < layers.size() && going_on; ++l) {
            going_on = run_layer(layers[l], steps[l], step, tensors, l == 0);
            if (going_on && step.hidden_LTM != nullptr)
                add_by_team(step.x_TM, tensors.delta_TM, step, step.hidden_LTM + l * step.tokens * step.width);
        }
        add_by_team(step.x_TM, tensors.delta_TM, step, step.x_TM);
#pragma omp single
        ok = going_on;
    }
    return ok;
}
