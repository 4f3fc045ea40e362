#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include "bind.h"
#include "checks.h"
#include "experts.h"
#include "memory.h"

namespace py = pybind11;

namespace {

at::Tensor allocate(int64_t num_slots, int64_t width, int64_t model_width) {
    const int64_t elements = ExpertSize{model_width, width}.elements();
    auto memory = allocate_streamed(num_slots * elements * sizeof(uint16_t));
    return at::from_blob(memory.get(), {num_slots, elements}, [memory](void*) {}, at::TensorOptions(at::kBFloat16));
}

void pack(const at::Tensor& gate_up_2ID, const at::Tensor& down_DI, const at::Tensor& packed_P) {
    TORCH_CHECK_VALUE(down_DI.dim() == 2 && gate_up_2ID.dim() == 2, "weights must have two dimensions");
    const ExpertSize size{down_DI.size(0), down_DI.size(1)};
    TORCH_CHECK_VALUE(gate_up_2ID.size(0) == 2 * size.width && gate_up_2ID.size(1) == size.model_width,
                      "gate_up_2ID is ", gate_up_2ID.sizes(), ", down_DI ", down_DI.sizes());
    TORCH_CHECK_VALUE(packed_P.numel() == size.elements(), "packed_P must have ", size.elements(), " elements");
    const auto *gate_up = bf16_of(gate_up_2ID, "gate_up_2ID"), *down = bf16_of(down_DI, "down_DI");
    auto* packed = bf16_of(packed_P, "packed_P");
    py::gil_scoped_release released;
    pack_expert(size, gate_up, down, packed);
}

Experts experts_of(const at::Tensor& packed_LP, int64_t width, int64_t model_width) {
    const Experts experts{{model_width, width}, packed_LP.size(0), bf16_of(packed_LP, "packed_LP")};
    TORCH_CHECK_VALUE(packed_LP.dim() == 2 && packed_LP.size(1) == experts.size.elements(), "packed_LP is ",
                      packed_LP.sizes(), ", not ", experts.size.elements(), " elements for each slot");
    return experts;
}

at::Tensor apply(const at::Tensor& packed_LP, int64_t width, const at::Tensor& x_RD, const at::Tensor& counts_L) {
    const Rows x = rows_of(x_RD, "x_RD");
    const int64_t num_rows = x_RD.size(0), model_width = x_RD.size(1);
    const Experts experts = experts_of(packed_LP, width, model_width);
    const auto* counts = data_of<int64_t>(counts_L, at::kLong, "counts_L");
    TORCH_CHECK_VALUE(counts_L.numel() == experts.num_slots, "counts_L must have ", experts.num_slots, " elements");
    int64_t used = 0;
    for (int64_t slot = 0; slot < experts.num_slots; ++slot) {
        TORCH_CHECK_VALUE(counts[slot] >= 0, "counts_L holds ", counts[slot]);
        used += counts[slot];
    }
    TORCH_CHECK_VALUE(used <= num_rows, "counts_L adds up to ", used, " of ", num_rows, " rows");
    at::Tensor y_RD = at::empty({num_rows, model_width}, x_RD.options());
    auto* y = bf16_of(y_RD, "y_RD");
    py::gil_scoped_release released;
    apply_experts(experts, x, counts, used, y, num_threads());
    std::fill(y + used * model_width, y + num_rows * model_width, uint16_t{0});
    return y_RD;
}

std::tuple<at::Tensor, at::Tensor> mix(const at::Tensor& packed_LP, int64_t width, const at::Tensor& x_TD,
                                       const at::Tensor& slots_TK, const at::Tensor& weights_TK) {
    const Rows x = rows_of(x_TD, "x_TD");
    const int64_t num_tokens = x_TD.size(0), model_width = x_TD.size(1);
    const Experts experts = experts_of(packed_LP, width, model_width);
    TORCH_CHECK_VALUE(slots_TK.dim() == 2 && slots_TK.size(0) == num_tokens && slots_TK.size(1) > 0, "slots_TK is ",
                      slots_TK.sizes(), " for ", num_tokens, " tokens");
    TORCH_CHECK_VALUE(weights_TK.sizes() == slots_TK.sizes(), "weights_TK is ", weights_TK.sizes(), ", slots_TK ",
                      slots_TK.sizes());
    const auto* slots = data_of<int64_t>(slots_TK, at::kLong, "slots_TK");
    const auto* weights = fp32_of(weights_TK, "weights_TK");
    at::Tensor y_TD = at::empty({num_tokens, model_width}, x_TD.options());
    at::Tensor counts_L = at::empty({experts.num_slots}, slots_TK.options());
    auto* y = bf16_of(y_TD, "y_TD");
    auto* counts = data_of<int64_t>(counts_L, at::kLong, "counts_L");
    bool ok;
    {
        py::gil_scoped_release released;
        ok = mix_experts(experts, x, num_tokens, slots_TK.size(1), slots, weights, y, counts, num_threads());
    }
    TORCH_CHECK_INDEX(ok, "slots_TK names a slot that is not among the ", experts.num_slots);
    return {y_TD, counts_L};
}

}  // namespace

void bind_experts(py::module_& module) {
    module.def("allocate_experts", &allocate, py::arg("num_slots"), py::arg("width"), py::arg("model_width"),
               "packed_LP, empty: memory of 2 MiB pages.");
    module.def("pack_expert", &pack, py::arg("gate_up_2ID"), py::arg("down_DI"), py::arg("packed_P"));
    module.def("apply_experts", &apply, py::arg("packed_LP"), py::arg("width"), py::arg("x_RD"), py::arg("counts_L"));
    module.def("mix_experts", &mix, py::arg("packed_LP"), py::arg("width"), py::arg("x_TD"), py::arg("slots_TK"),
               py::arg("weights_TK"));
}
