#include "gemm.h"

#include <omp.h>

#include <algorithm>

#include "stores.h"
#include "vectors.h"

namespace {

// Rows and vectors of columns that one thread computes.
struct Part {
    int64_t first_row, end_row, first_vector, end_vector;
};

// Columns are shared out first, so that each thread streams its own part of the weights once. Where there are many rows
// and few columns, rows are as well.
Part part_of(int64_t rank, int64_t team, int64_t num_rows, int64_t vectors) {
    const int64_t least = num_rows < 16 * kTileRows ? 1 : kPanel / kLanes;
    const int64_t across = std::clamp<int64_t>(vectors / least, 1, team), down = team / across;
    if (rank >= across * down) return {0, 0, 0, 0};
    const int64_t i = rank / across, j = rank % across;
    return {num_rows * i / down, num_rows * (i + 1) / down, vectors * j / across, vectors * (j + 1) / across};
}

struct Product {
    Rows x;
    int64_t inputs;
    const uint16_t* packed;
    int64_t columns;
    const uint16_t* bias;
    Output y;

    const uint16_t* weights_from(int64_t column) const {
        const int64_t panel = column / kPanel * kPanel;
        return packed + packed_size(panel, inputs) + 2 * (column - panel);
    }

    template <int kVectors> void strip(const Part& part, int64_t column, int64_t next_column) const {
        const int64_t width = panel_width(column / kPanel * kPanel, columns);
        const bool more = next_column < part.end_vector * kLanes;
        const int64_t ahead = more ? 4 * panel_width(next_column, columns) * pairs_of(inputs) : 0;
        multiply_rows<kVectors>(
            x, part.first_row, part.end_row - part.first_row, inputs, weights_from(column), 2 * width,
            weights_from(more ? next_column : column), ahead, [&](int64_t row, const __m512(&sum)[kVectors]) {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    const int64_t at = column + kLanes * v;
                    const __mmask16 mask = lanes(columns - at);
                    __m512 out = sum[v];
                    if (bias != nullptr) out = _mm512_add_ps(out, load_bf16(bias + at, mask));
                    if (y.bf16 != nullptr) put_rounded(y.bf16 + row * columns + at, out, mask);
                    else _mm512_mask_storeu_ps(y.fp32 + row * columns + at, mask, out);
                }
            });
    }

    void compute(const Part& part) const {
        for (int64_t vector = part.first_vector; vector < part.end_vector;) {
            const int64_t per_panel = kPanel / kLanes;
            const int64_t next = std::min((vector / per_panel + 1) * per_panel, part.end_vector);
            switch (next - vector) {
                case 1: strip<1>(part, vector * kLanes, next * kLanes); break;
                case 2: strip<2>(part, vector * kLanes, next * kLanes); break;
                case 3: strip<3>(part, vector * kLanes, next * kLanes); break;
                case 4: strip<4>(part, vector * kLanes, next * kLanes); break;
            }
            vector = next;
        }
    }
};

constexpr int64_t kWorthATeam = 1 << 15;  // elements of weights, or products: below, waking threads costs more

}  // namespace

void multiply(const Rows& x, int64_t num_rows, int64_t inputs, const uint16_t* packed, int64_t columns,
              const uint16_t* bias, const Output& y, int threads) {
    const bool alone = num_rows * columns * inputs < kWorthATeam;
#pragma omp parallel num_threads(alone ? 1 : threads)
    multiply_by_team(x, num_rows, inputs, packed, columns, bias, y);
}

void multiply_by_team(const Rows& x, int64_t num_rows, int64_t inputs, const uint16_t* packed, int64_t columns,
                      const uint16_t* bias, const Output& y) {
    const Product product{x, inputs, packed, columns, bias, y};
    const int64_t vectors = padded_columns(columns) / kLanes;
    product.compute(part_of(omp_get_thread_num(), omp_get_num_threads(), num_rows, vectors));
#pragma omp barrier
}
