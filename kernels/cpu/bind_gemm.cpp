#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <optional>

#include "bind.h"
#include "checks.h"
#include "gemm.h"
#include "memory.h"

namespace py = pybind11;

namespace {

at::Tensor pack(const at::Tensor& weight_OI) {
    TORCH_CHECK_VALUE(weight_OI.dim() == 2, "a weight must have two dimensions");
    const int64_t columns = weight_OI.size(0), inputs = weight_OI.size(1), size = packed_size(columns, inputs);
    const auto* from = bf16_of(weight_OI, "weight_OI");
    auto memory = allocate_streamed(size * sizeof(uint16_t));
    {
        py::gil_scoped_release released;
        pack_weight(from, columns, inputs, static_cast<uint16_t*>(memory.get()), num_threads());
    }
    return at::from_blob(memory.get(), {size}, [memory](void*) {}, at::TensorOptions(at::kBFloat16));
}

at::Tensor linear(const at::Tensor& x_TI, const at::Tensor& packed, int64_t out_features,
                  const std::optional<at::Tensor>& bias_O, bool wide) {
    const Rows x = rows_of(x_TI, "x_TI");
    const int64_t rows = x_TI.size(0), inputs = x_TI.size(1);
    TORCH_CHECK_VALUE(packed.numel() == packed_size(out_features, inputs), "x has ", inputs,
                      " features, the weight another number");
    TORCH_CHECK_VALUE(!bias_O || bias_O->numel() == out_features, "the bias is not of ", out_features, " features");
    const auto* bias = bias_O ? bf16_of(*bias_O, "bias_O") : nullptr;
    const auto* weight = bf16_of(packed, "packed");
    at::Tensor y_TO = at::empty({rows, out_features}, at::TensorOptions(wide ? at::kFloat : at::kBFloat16));
    const Output y{wide ? nullptr : bf16_of(y_TO, "y"), wide ? fp32_of(y_TO, "y") : nullptr};
    py::gil_scoped_release released;
    multiply(x, rows, inputs, weight, out_features, bias, y, num_threads());
    return y_TO;
}

}  // namespace

void bind_gemm(py::module_& module) {
    module.def("pack_linear", &pack, "A bf16 weight_OI in panels, in memory of 2 MiB pages.");
    module.def("linear", &linear, py::arg("x_TI"), py::arg("packed"), py::arg("out_features"), py::arg("bias_O"),
               py::arg("wide"), "x weight^T + bias; fp32 if wide, else rounded to bf16.");
}
