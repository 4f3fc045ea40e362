#include "panels.h"

#include <cstring>

namespace {

uint32_t pair_at(const uint16_t* row, int64_t pair, int64_t inputs) {
    uint32_t bits = 0;
    if (row != nullptr) std::memcpy(&bits, row + 2 * pair, 2 * pair + 1 < inputs ? 4 : 2);
    return bits;
}

}  // namespace

void pack_panel(const uint16_t* const* row_of_column, int64_t width, int64_t inputs, uint16_t* panel) {
    constexpr int64_t kAtOnce = 16;  // pairs: one cache line of each row
    for (int64_t begin = 0; begin < pairs_of(inputs); begin += kAtOnce) {
        const int64_t end = std::min(begin + kAtOnce, pairs_of(inputs));
        for (int64_t column = 0; column < width; ++column)
            for (int64_t pair = begin; pair < end; ++pair) {
                const uint32_t bits = pair_at(row_of_column[column], pair, inputs);
                std::memcpy(panel + 2 * (pair * width + column), &bits, 4);
            }
    }
}

void pack_weight(const uint16_t* weight, int64_t columns, int64_t inputs, uint16_t* packed, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < columns; first += kPanel) {
        const uint16_t* row_of_column[kPanel];
        for (int64_t c = 0; c < kPanel; ++c)
            row_of_column[c] = first + c < columns ? weight + (first + c) * inputs : nullptr;
        pack_panel(row_of_column, panel_width(first, columns), inputs, packed + packed_size(first, inputs));
    }
}
