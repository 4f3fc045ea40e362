// The plan of a step's attention with the tensors that it points into, as Python holds it.
#pragma once

#include <ATen/core/Tensor.h>

#include "attention_plan.h"

struct BoundPlan {
    AttentionPlan pieces;
    at::Tensor block_table_SB, slot_T;
    int block_size;
};
