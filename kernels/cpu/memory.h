// Memory for what is streamed: large pages, and how fast the machine can read.
#pragma once

#include <cstddef>
#include <cstdint>

// The exclusive or of all 64-bit words of `bytes` bytes, read once by all threads: a checksum that must look at every
// byte, for measuring the bandwidth that kernels are held against. `bytes` beyond a multiple of 64 are not read.
uint64_t read_all(const void* data, size_t bytes, int threads);
