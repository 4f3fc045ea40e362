// What happens to a head between the projection and attention: norm, rotation, rounding.
#pragma once

#include <cstdint>

// Norms (unless `weight_W` is null) and rotates the first `rotary_width` of `width` numbers, all in fp32, rounds once.
// `out_W` may be `x_W`. The squares of a norm are added up in 16 lanes in the order of the numbers. `cos` and `sin`
// have `rotary_width` numbers, the first half of `sin` negated.
void turn_head(const uint16_t* x_W, int width, const float* weight_W, float eps, const float* cos, const float* sin,
               int rotary_width, uint16_t* out_W);
