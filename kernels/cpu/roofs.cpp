#include "roofs.h"

#include <immintrin.h>
#include <omp.h>

uint64_t read_all(const void* data, size_t bytes, int threads) {
    const auto* lines = static_cast<const __m512i*>(data);
    const size_t num_lines = bytes / 64;
    uint64_t checksum = 0;
#pragma omp parallel num_threads(threads) reduction(^ : checksum)
    {
        const size_t rank = omp_get_thread_num(), team = omp_get_num_threads();
        const size_t begin = num_lines * rank / team, end = num_lines * (rank + 1) / team;
        __m512i sum_8[8] = {};  // eight chains, so that no load waits for the one before
        size_t line = begin;
        for (; line + 8 <= end; line += 8)
            for (int i = 0; i < 8; ++i) sum_8[i] = _mm512_xor_si512(sum_8[i], _mm512_loadu_si512(lines + line + i));
        for (; line < end; ++line) sum_8[0] = _mm512_xor_si512(sum_8[0], _mm512_loadu_si512(lines + line));
        for (int i = 1; i < 8; ++i) sum_8[0] = _mm512_xor_si512(sum_8[0], sum_8[i]);
        alignas(64) uint64_t words[8];
        _mm512_store_si512(words, sum_8[0]);
        for (uint64_t word : words) checksum ^= word;
    }
    return checksum;
}

float multiply_in_registers(int64_t rounds, int threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        const auto one = (__m512bh)_mm512_set1_epi32(0x3f803f80);
        __m512 sum[24];
        for (int i = 0; i < 24; ++i) sum[i] = _mm512_set1_ps(i);  // all different, or one would be computed for all
        for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
            for (auto& each : sum) each = _mm512_dpbf16_ps(each, one, one);
        }
        for (auto& each : sum) total += _mm512_reduce_add_ps(each);
    }
    return total;
}
