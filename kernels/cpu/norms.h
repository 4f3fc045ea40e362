// The residual stream and its RMS norm.
#pragma once

#include <cstdint>

// x_TM += delta_TM (unless that is null), rounded to bf16; h_TM = x / sqrt(mean(x^2) + eps) * weight, in fp32 and
// rounded once. Squares are added up in 4 times 16 lanes in the order of the numbers.
void add_rms_norm(uint16_t* x_TM, const uint16_t* delta_TM, const uint16_t* weight_M, float eps, int64_t tokens,
                  int64_t width, uint16_t* h_TM, int threads);

// The same by the team of the parallel region around, all of whose threads call it and leave it together.
void add_rms_norm_by_team(uint16_t* x_TM, const uint16_t* delta_TM, const uint16_t* weight_M, float eps, int64_t tokens,
                          int64_t width, uint16_t* h_TM);
