// y = x w^T + bias with a packed bf16 weight (panels.h), accumulated in fp32 (tile.h).
#pragma once

#include <cstdint>

#include "tile.h"

// Exactly one of the outputs is set; both are [rows, columns], row-major.
struct Output {
    uint16_t* bf16;
    float* fp32;
};

// `bias` holds `columns` numbers in bf16, or is null; it is added to the finished sum.
void multiply(const Rows& x, int64_t num_rows, int64_t inputs, const uint16_t* packed, int64_t columns,
              const uint16_t* bias, const Output& y, int threads);

// The same by the team of the parallel region around, all of whose threads call it and leave it together.
void multiply_by_team(const Rows& x, int64_t num_rows, int64_t inputs, const uint16_t* packed, int64_t columns,
                      const uint16_t* bias, const Output& y);
