// Memory of one thread for what does not outlive a call: grown, never shrunk, and aligned to cache lines.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

class Scratch {
public:
    float* floats(size_t count) {
        if (count > capacity_) {
            const size_t bytes = (count * sizeof(float) + 4095) / 4096 * 4096;
            memory_.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
            capacity_ = memory_ ? bytes / sizeof(float) : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    size_t capacity_ = 0;
};
