// For bind_*.cpp: what they check of the tensors that Python hands in, and the pointers they pass on.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>

#include "rows.h"

// Threads of a parallel region of ours: those of torch (torch.set_num_threads), also on a thread new to torch.
inline int num_threads() { return at::get_num_threads(); }

template <class T> T* data_of(const at::Tensor& tensor, at::ScalarType dtype, const char* name) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must be ", dtype, ", not ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.is_contiguous() && tensor.is_cpu(), name, " must be contiguous and on the CPU");
    return static_cast<T*>(tensor.data_ptr());
}

// bf16 as its 16 bits: compute files know nothing of torch's types.
inline uint16_t* bf16_of(const at::Tensor& tensor, const char* name) {
    return data_of<uint16_t>(tensor, at::kBFloat16, name);
}

inline float* fp32_of(const at::Tensor& tensor, const char* name) { return data_of<float>(tensor, at::kFloat, name); }

// Rows of bf16, which may lie apart as the columns of a wider tensor do.
inline Rows rows_of(const at::Tensor& x, const char* name) {
    TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, name, " must be BFloat16, not ", x.scalar_type());
    TORCH_CHECK_VALUE(x.dim() == 2 && x.is_cpu() && (x.stride(1) == 1 || x.size(1) == 1), name,
                      " must be rows on the CPU, each contiguous");
    return {static_cast<const uint16_t*>(x.data_ptr()), x.stride(0), nullptr};
}
