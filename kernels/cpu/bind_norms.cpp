#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "bind.h"
#include "checks.h"
#include "norms.h"

namespace {

std::pair<at::Tensor, at::Tensor> add_norm(const at::Tensor& x_TM, const std::optional<at::Tensor>& delta_TM,
                                           const at::Tensor& weight_M, float eps) {
    const int64_t width = x_TM.size(-1), tokens = width ? x_TM.numel() / width : 0;
    TORCH_CHECK_VALUE(weight_M.numel() == width, "x has rows of ", width, " numbers, the weight ", weight_M.numel());
    TORCH_CHECK_VALUE(!delta_TM || delta_TM->sizes() == x_TM.sizes(), "x and what is added must have one shape");
    at::Tensor h_TM = at::empty(x_TM.sizes(), x_TM.options());
    add_rms_norm(bf16_of(x_TM, "x"), delta_TM ? bf16_of(*delta_TM, "delta") : nullptr, bf16_of(weight_M, "weight"), eps,
                 tokens, width, bf16_of(h_TM, "h"), num_threads());
    return {x_TM, h_TM};
}

}  // namespace

void bind_norms(pybind11::module_& module) { module.def("add_rms_norm", &add_norm); }
