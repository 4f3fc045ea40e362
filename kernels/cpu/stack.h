// All layers of a decoder in one parallel region: the kernels of this folder one after another, by one team of threads.
//
// What it saves is what a layer costs besides its work: calls from Python, allocations, and waking the threads ten times.
// The bits are those of the kernels called one by one, since they are the same code.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "experts.h"
#include "gate.h"

struct Weight {
    const uint16_t* packed;
    int64_t columns;
    const uint16_t* bias;  // or null
};

// A layer of attention with its projections and a mixture, all of whose experts are here.
struct StackLayer {
    const uint16_t* attention_norm_M;
    const uint16_t* mlp_norm_M;
    float eps;
    Weight qkv, out, gate;
    AttentionShape attention;
    const float* head_norm_NW;  // or null
    float head_eps;
    Gate routing;
    const float* routing_bias_E;  // or null
    Experts experts;
};

// Where a layer finds its keys and values in this step, and its experts.
struct LayerStep {
    const AttentionPlan* plan;
    const int64_t* slot_T;
    const int32_t* block_table_SB;
    int64_t columns;
    int block_size;
    uint16_t* kv_NCbW;
    const int64_t* slot_E;  // of each expert
    int64_t* rows_L;        // to which the rows that each slot computes are added
    float* weights_TK;      // where the gate's weights are left
};

struct StackStep {
    int64_t tokens, width;
    uint16_t* x_TM;  // the stream: embeddings at first, the last layer's result at the end
    const float *cos_TR, *sin_TR;
    uint16_t* hidden_LTM;  // the stream after each layer; null: nobody asks
};

// Elements of working memory (16 bits) that `run_stack` needs.
int64_t workspace_size(const std::vector<StackLayer>& layers, const StackStep& step);

// False if a layer's slot_E names a slot that does not exist; what it left behind is then worthless.
bool run_stack(const std::vector<StackLayer>& layers, const std::vector<LayerStep>& steps, const StackStep& step,
               uint16_t* workspace, int threads);
