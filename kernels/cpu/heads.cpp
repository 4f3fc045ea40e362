#include "heads.h"

#include <cmath>

#include "scratch.h"
#include "stores.h"
#include "powers.h"
#include "vectors.h"

void turn_head(const uint16_t* x_W, int width, const float* weight_W, float eps, const float* cos, const float* sin,
               int rotary_width, uint16_t* out_W) {
    static thread_local Scratch scratch;
    float* wide_W = scratch.floats(width + 15);  // whole vectors are stored
    __m512 squares = _mm512_setzero_ps();
    for (int w = 0; w < width; w += 16) {
        const __mmask16 mask = lanes(width - w);
        const __m512 x = load_bf16(x_W + w, mask);
        squares = _mm512_fmadd_ps(x, x, squares);
        _mm512_storeu_ps(wide_W + w, x);
    }
    if (weight_W) {
        const __m512 inverse = _mm512_set1_ps(1.f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps));
        for (int w = 0; w < width; w += 16) {
            const __mmask16 mask = lanes(width - w);
            const __m512 normed = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, wide_W + w), inverse);
            _mm512_storeu_ps(wide_W + w, _mm512_mul_ps(normed, _mm512_maskz_loadu_ps(mask, weight_W + w)));
        }
    }
    const int half = rotary_width / 2;
    for (int w = 0; w < half; w += 16) {
        const __mmask16 mask = lanes(half - w);
        const auto load = [&](const float* from) { return _mm512_maskz_loadu_ps(mask, from); };
        const __m512 a = load(wide_W + w), b = load(wide_W + half + w);
        const __m512 first = _mm512_fmadd_ps(b, load(sin + w), _mm512_mul_ps(a, load(cos + w)));
        const __m512 second = _mm512_fmadd_ps(a, load(sin + half + w), _mm512_mul_ps(b, load(cos + half + w)));
        put_rounded(out_W + w, first, mask);
        put_rounded(out_W + half + w, second, mask);
    }
    for (int w = rotary_width; w < width; w += 16) {
        const __mmask16 mask = lanes(width - w);
        put_rounded(out_W + w, _mm512_maskz_loadu_ps(mask, wide_W + w), mask);
    }
}
