#include "norms.h"

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "powers.h"
#include "stores.h"
#include "vectors.h"

namespace {

constexpr int64_t kWorthATeam = 32768;  // numbers; waking a thread and waiting for it costs a microsecond or two

void add_rms_norm_row(uint16_t* x_M, const uint16_t* delta_M, const uint16_t* weight_M, float eps, int64_t width,
                      uint16_t* h_M) {
    __m512 squares[4] = {};
    for (int64_t m = 0; m < width; m += 64) {
        for (int i = 0; i < 4; ++i) {
            const int64_t at = m + 16 * i;
            const __mmask16 mask = lanes(std::max<int64_t>(0, width - at));
            __m512 x = load_bf16(x_M + at, mask);
            if (delta_M) {
                const __m256bh sum = _mm512_cvtneps_pbh(_mm512_add_ps(x, load_bf16(delta_M + at, mask)));
                put_bf16(x_M + at, sum, mask);
                x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)sum), 16));
            }
            squares[i] = _mm512_fmadd_ps(x, x, squares[i]);
        }
    }
    const __m512 low = _mm512_add_ps(squares[0], squares[1]), high = _mm512_add_ps(squares[2], squares[3]);
    const float sum = sum_of(_mm512_add_ps(low, high));
    const __m512 inverse = _mm512_set1_ps(1.f / std::sqrt(sum / static_cast<float>(width) + eps));
    for (int64_t m = 0; m < width; m += 16) {
        const __mmask16 mask = lanes(width - m);
        const __m512 normed = _mm512_mul_ps(load_bf16(x_M + m, mask), inverse);
        put_rounded(h_M + m, _mm512_mul_ps(normed, load_bf16(weight_M + m, mask)), mask);
    }
}

}  // namespace

void add_rms_norm(uint16_t* x_TM, const uint16_t* delta_TM, const uint16_t* weight_M, float eps, int64_t tokens,
                  int64_t width, uint16_t* h_TM, int threads) {
#pragma omp parallel num_threads(threads) if (tokens * width >= kWorthATeam)
    add_rms_norm_by_team(x_TM, delta_TM, weight_M, eps, tokens, width, h_TM);
}

void add_rms_norm_by_team(uint16_t* x_TM, const uint16_t* delta_TM, const uint16_t* weight_M, float eps, int64_t tokens,
                          int64_t width, uint16_t* h_TM) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t)
        add_rms_norm_row(x_TM + t * width, delta_TM ? delta_TM + t * width : nullptr, weight_M, eps, width,
                         h_TM + t * width);
}
