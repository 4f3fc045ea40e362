// What the machine can do at best, measured: the roofs that benchmarks hold the kernels against.
#pragma once

#include <cstddef>
#include <cstdint>

// The exclusive or of all 64-bit words of `bytes` bytes, read once by all threads. A checksum has to look at every byte,
// which a compiler cannot leave out. `bytes` beyond a multiple of 64 are not read.
uint64_t read_all(const void* data, size_t bytes, int threads);

// `rounds` times 24 independent vdpbf16ps (64 floating point operations each, as 32 multiply-adds) in registers, on every
// thread. Returns what they add up to.
float multiply_in_registers(int64_t rounds, int threads);
