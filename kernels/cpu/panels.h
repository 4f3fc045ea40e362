// How a bf16 weight [outputs, inputs] is packed: panels of 64 columns (outputs), the last one of 16, 32, 48 or 64. A panel
// is [inputs / 2][columns][2], what vdpbf16ps multiplies with a broadcast pair of inputs; missing columns and the second
// half of a last odd pair are zero. So the memory of a panel is read from front to back.
#pragma once

#include <algorithm>
#include <cstdint>

constexpr int64_t kLanes = 16;  // fp32 numbers of a vector
constexpr int64_t kPanel = 64;  // columns of a panel: four vectors

constexpr int64_t pairs_of(int64_t inputs) { return (inputs + 1) / 2; }
constexpr int64_t padded_columns(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

// In elements of 16 bits.
constexpr int64_t packed_size(int64_t columns, int64_t inputs) { return padded_columns(columns) * pairs_of(inputs) * 2; }

// Of the panel that begins at column `first` of `columns`.
constexpr int64_t panel_width(int64_t first, int64_t columns) {
    return std::min(kPanel, padded_columns(columns) - first);
}

// Column c of the panel is the row of weights `row_of_column[c]`, or zero where that is null.
void pack_panel(const uint16_t* const* row_of_column, int64_t width, int64_t inputs, uint16_t* panel);

// The whole of a row-major weight, on all threads.
void pack_weight(const uint16_t* weight, int64_t columns, int64_t inputs, uint16_t* packed, int threads);
