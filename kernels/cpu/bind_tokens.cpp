#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "bind.h"
#include "checks.h"
#include "gate.h"
#include "norms.h"

namespace {

using Pair = std::pair<at::Tensor, at::Tensor>;

Pair add_norm(const at::Tensor& x_TM, const std::optional<at::Tensor>& delta_TM, const at::Tensor& weight_M,
              float eps) {
    const int64_t width = x_TM.size(-1), tokens = width ? x_TM.numel() / width : 0;
    TORCH_CHECK_VALUE(weight_M.numel() == width, "x has rows of ", width, " numbers, the weight ", weight_M.numel());
    TORCH_CHECK_VALUE(!delta_TM || delta_TM->sizes() == x_TM.sizes(), "x and what is added must have one shape");
    at::Tensor h_TM = at::empty(x_TM.sizes(), x_TM.options());
    add_rms_norm(bf16_of(x_TM, "x"), delta_TM ? bf16_of(*delta_TM, "delta") : nullptr, bf16_of(weight_M, "weight"), eps,
                 tokens, width, bf16_of(h_TM, "h"), num_threads());
    return {x_TM, h_TM};
}

Gate gate_of(int64_t experts, int64_t top_k, bool sigmoid, int64_t num_groups, int64_t top_groups, bool renormalize,
             float scaling) {
    TORCH_CHECK_VALUE(num_groups == 1 || (experts % num_groups == 0 && experts >= 2 * num_groups), experts,
                      " experts are not ", num_groups, " equal groups of at least 2");
    TORCH_CHECK_VALUE(top_k > 0 && top_groups <= num_groups && top_k <= experts / num_groups * top_groups,
                      "the groups that are kept do not hold ", top_k, " experts");
    return {experts, top_k, sigmoid, num_groups, top_groups, renormalize, scaling};
}

Pair route_tokens(const at::Tensor& logits_TE, const std::optional<at::Tensor>& bias_E, const Gate& gate) {
    const int64_t experts = gate.num_experts, top_k = gate.top_k;
    TORCH_CHECK_VALUE(logits_TE.dim() == 2 && logits_TE.size(1) == experts, "logits of ", experts, " experts are needed");
    const int64_t tokens = logits_TE.size(0);
    TORCH_CHECK_VALUE(!bias_E || bias_E->numel() == experts, "the bias has another number of experts");
    const bool narrow = logits_TE.scalar_type() == at::kBFloat16;
    const Logits logits = {narrow ? nullptr : fp32_of(logits_TE, "logits"),
                           narrow ? bf16_of(logits_TE, "logits") : nullptr};
    at::Tensor ids_TK = at::empty({tokens, top_k}, at::TensorOptions(at::kLong));
    at::Tensor weights_TK = at::empty({tokens, top_k}, at::TensorOptions(at::kFloat));
    route(gate, logits, bias_E ? fp32_of(*bias_E, "bias") : nullptr, tokens,
          data_of<int64_t>(ids_TK, at::kLong, "ids"), fp32_of(weights_TK, "weights"), num_threads());
    return {ids_TK, weights_TK};
}

}  // namespace

void bind_tokens(pybind11::module_& module) {
    module.def("add_rms_norm", &add_norm, "The stream, x + delta left in x, and its norm.");
    pybind11::class_<Gate>(module, "Gate").def(pybind11::init(&gate_of));
    module.def("route", &route_tokens, "ids_TK and weights_TK.");
}
