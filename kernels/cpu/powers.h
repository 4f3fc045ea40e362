// Exponentials of 16 lanes and their sum. Every lane gets the bits that it would get in any other lane.
#pragma once

#include <immintrin.h>

// 2^x, relative error below 1.5e-7; exactly 1 at 0 and exactly 0 below -160. A polynomial of degree 6 with the least
// largest relative error on [-0.5, 0.5] that is 1 at 0.
inline __m512 exp2_16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.f), x);  // in this order a NaN stays
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.00015353361959569156f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.0013398873852565885f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.00961843691766262f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.055503323674201965f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.24022647738456726f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.6931471824645996f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(y, whole);
}

// e^x for any x, relative error below 2e-7; exactly 1 at 0 and exactly 0 below -140. As exp2_16, but on
// [-ln 2 / 2, ln 2 / 2].
inline __m512 exp_16(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(200.f), _mm512_max_ps(_mm512_set1_ps(-200.f), x));
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.442695041f)),
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145751953125f), x);  // ln 2 in two parts, the first exact
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.428606765330187e-06f), rest);  // in every product
    __m512 y = _mm512_set1_ps(0.0013843653723597527f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.00837415549904108f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.04166800156235695f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.16666431725025177f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.4999999403953552f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.f));
    return _mm512_scalef_ps(y, whole);
}

// The sum of 16 lanes, halves onto halves: one order, written out.
inline float sum_of(__m512 x) {
    const __m256 x8 = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
    const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
    return _mm_cvtss_f32(_mm_add_ss(x2, _mm_movehdup_ps(x2)));
}
