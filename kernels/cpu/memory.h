// Memory that kernels stream: 2 MiB pages, of which a core's TLB covers gigabytes instead of megabytes.
#pragma once

#include <cstddef>
#include <memory>

// Zeroed memory at a multiple of 64 bytes in a mapping that asks for 2 MiB pages. Small pieces share a mapping, which
// goes back to the system with the last of them; pages that nobody writes take no memory. Safe on any thread. Throws
// std::bad_alloc.
std::shared_ptr<void> allocate_streamed(size_t bytes);

// Working memory of the calling thread, at a multiple of 64 bytes, valid until its next call; never zeroed. Up to 64 MiB
// are kept for the next call, since fresh pages cost more than what is written into them.
void* scratch(size_t bytes);
