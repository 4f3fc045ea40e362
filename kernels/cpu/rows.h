#pragma once

#include <cstdint>

// Where the rows of a product lie: row r at base + index[r] * stride, elements of 16 bits.
struct Rows {
    const uint16_t* base;
    int64_t stride;
    const int32_t* index;  // null: row r is the r-th

    const uint16_t* row(int64_t r) const { return base + (index == nullptr ? r : index[r]) * stride; }
};
