#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "bind.h"
#include "checks.h"
#include "gate.h"

namespace {

std::pair<at::Tensor, at::Tensor> route_tokens(const at::Tensor& logits_TE, const std::optional<at::Tensor>& bias_E,
                                               const Gate& gate) {
    TORCH_CHECK_VALUE(logits_TE.dim() == 2 && logits_TE.size(1) == gate.num_experts, "logits of ", gate.num_experts,
                      " experts are needed");
    TORCH_CHECK_VALUE(!bias_E || bias_E->numel() == gate.num_experts, "the bias has another number of experts");
    const bool narrow = logits_TE.scalar_type() == at::kBFloat16;
    const Logits logits = {narrow ? nullptr : fp32_of(logits_TE, "logits"), narrow ? bf16_of(logits_TE, "logits") : nullptr};
    const int64_t tokens = logits_TE.size(0);
    at::Tensor ids_TK = at::empty({tokens, gate.top_k}, at::TensorOptions(at::kLong));
    at::Tensor weights_TK = at::empty({tokens, gate.top_k}, at::TensorOptions(at::kFloat));
    route(gate, logits, bias_E ? fp32_of(*bias_E, "bias") : nullptr, tokens,
          data_of<int64_t>(ids_TK, at::kLong, "ids"), fp32_of(weights_TK, "weights"), num_threads());
    return {ids_TK, weights_TK};
}

}  // namespace

void bind_gate(pybind11::module_& module) {
    namespace py = pybind11;
    py::class_<Gate>(module, "Gate")
        .def(py::init([](int64_t num_experts, int64_t top_k, bool sigmoid, int64_t num_groups, int64_t top_groups,
                         bool renormalize, float scaling) {
            TORCH_CHECK_VALUE(num_groups == 1 || (num_experts % num_groups == 0 && num_experts >= 2 * num_groups),
                              num_experts, " experts are not ", num_groups, " equal groups of at least 2");
            TORCH_CHECK_VALUE(top_k > 0 && top_k <= num_experts / num_groups * top_groups && top_groups <= num_groups,
                              "the groups that are kept do not hold ", top_k, " experts");
            return Gate{num_experts, top_k, sigmoid, num_groups, top_groups, renormalize, scaling};
        }));
    module.def("route", &route_tokens);
}
