#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include "attention.h"
#include "bind.h"
#include "bind_plan.h"
#include "checks.h"

namespace {

BoundPlan plan(const AttentionShape& shape, const std::vector<int>& query_start_S1, const std::vector<int>& context_len_S,
          const at::Tensor& block_table_SB, const at::Tensor& slot_T, int block_size) {
    const int64_t spans = static_cast<int64_t>(context_len_S.size());
    TORCH_CHECK_VALUE(static_cast<int64_t>(query_start_S1.size()) == spans + 1, "query_start must have an entry more");
    TORCH_CHECK_VALUE(block_table_SB.dim() == 2 && block_table_SB.size(0) >= spans, "a row of the table per span");
    data_of<int32_t>(block_table_SB, at::kInt, "block_table");
    data_of<int64_t>(slot_T, at::kLong, "slot");
    return {plan_attention(shape, query_start_S1, context_len_S, block_size, num_threads()), block_table_SB, slot_T,
            block_size};
}

at::Tensor apply(const AttentionShape& shape, const std::optional<at::Tensor>& weight_NW, float eps,
                 const at::Tensor& qkv_TNW, const at::Tensor& cos_T1R, const at::Tensor& sin_T1R,
                 const at::Tensor& kv_NCbW, const BoundPlan& plan) {
    const int64_t tokens = qkv_TNW.size(0);
    TORCH_CHECK_VALUE(qkv_TNW.numel() == tokens * heads_of_token(shape) * shape.width, "qkv has another shape");
    TORCH_CHECK_VALUE(plan.slot_T.numel() == tokens, "the plan has ", plan.slot_T.numel(), " tokens, qkv ", tokens);
    TORCH_CHECK_VALUE(cos_T1R.numel() == tokens * shape.rotary_width && sin_T1R.numel() == cos_T1R.numel(),
                      "the rotary tables have another shape");
    TORCH_CHECK_VALUE(kv_NCbW.dim() == 4 && kv_NCbW.size(1) == 2 * shape.kv_heads &&
                          kv_NCbW.size(2) == plan.block_size && kv_NCbW.size(3) == shape.width,
                      "the cache has another shape");
    at::Tensor out_TQW = at::empty({tokens, shape.heads, shape.width}, qkv_TNW.options());
    const AttentionTensors tensors = {
        shape,
        bf16_of(qkv_TNW, "qkv"),
        bf16_of(kv_NCbW, "the cache"),
        plan.block_size,
        data_of<int32_t>(plan.block_table_SB, at::kInt, "block_table"),
        plan.block_table_SB.size(1),
        bf16_of(out_TQW, "out"),
        nullptr,
    };
    const Turn turn = {weight_NW ? fp32_of(*weight_NW, "weight") : nullptr, eps, fp32_of(cos_T1R, "cos"),
                       fp32_of(sin_T1R, "sin")};
    paged_attention(plan.pieces, tensors, turn, data_of<int64_t>(plan.slot_T, at::kLong, "slot"),
                    static_cast<int>(tokens));
    return out_TQW;
}

}  // namespace

void bind_attention(pybind11::module_& module) {
    namespace py = pybind11;
    py::class_<AttentionShape>(module, "AttentionShape")
        .def(py::init([](int heads, int kv_heads, int width, int rotary_width, float scale, std::optional<int> window) {
            TORCH_CHECK_VALUE(kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of kv_heads");
            TORCH_CHECK_VALUE(width > 0 && width % 2 == 0, "width must be even, not ", width);
            TORCH_CHECK_VALUE(rotary_width >= 0 && rotary_width <= width && rotary_width % 2 == 0,
                              "rotary_width must be even and at most width, not ", rotary_width);
            TORCH_CHECK_VALUE(!window || *window > 0, "window must be positive");
            return AttentionShape{heads, kv_heads, width, rotary_width, scale, window.value_or(kNoWindow)};
        }));
    py::class_<BoundPlan>(module, "AttentionPlan");
    module.def("plan_attention", &plan);
    module.def("paged_attention", &apply, py::call_guard<py::gil_scoped_release>());
}
