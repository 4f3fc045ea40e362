#include <ATen/ops/empty.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "bind.h"
#include "bind_plan.h"
#include "checks.h"
#include "stack.h"

namespace {

namespace py = pybind11;

// The layers and the tensors that they point into.
class Stack {
  public:
    explicit Stack(int64_t width) : width_(width) {}

    void add(const at::Tensor& attention_norm_M, const at::Tensor& mlp_norm_M, float eps, const at::Tensor& qkv,
             const std::optional<at::Tensor>& qkv_bias, const AttentionShape& attention,
             const std::optional<at::Tensor>& head_norm_NW, float head_eps, const at::Tensor& out,
             const std::optional<at::Tensor>& out_bias, const at::Tensor& gate, const Gate& routing,
             const std::optional<at::Tensor>& routing_bias_E, const at::Tensor& packed_LP, int64_t expert_width) {
        StackLayer layer{};
        layer.attention_norm_M = bf16_of(keep(attention_norm_M), "attention_norm_M");
        layer.mlp_norm_M = bf16_of(keep(mlp_norm_M), "mlp_norm_M");
        layer.eps = eps;
        layer.qkv = weight(qkv, width_, heads_of_token(attention) * attention.width, qkv_bias, "qkv");
        layer.attention = attention;
        layer.head_norm_NW = head_norm_NW ? fp32_of(keep(*head_norm_NW), "head_norm_NW") : nullptr;
        layer.head_eps = head_eps;
        layer.out = weight(out, attention.heads * attention.width, width_, out_bias, "out");
        layer.gate = weight(gate, width_, routing.num_experts, std::nullopt, "gate");
        layer.routing = routing;
        layer.routing_bias_E = routing_bias_E ? fp32_of(keep(*routing_bias_E), "routing_bias_E") : nullptr;
        layer.experts = {{width_, expert_width}, packed_LP.size(0), bf16_of(keep(packed_LP), "packed_LP")};
        TORCH_CHECK_VALUE(packed_LP.size(1) == layer.experts.size.elements(), "packed_LP is of other experts");
        layers_.push_back(layer);
    }

    using Results = std::pair<std::vector<at::Tensor>, std::optional<at::Tensor>>;

    // weights_TK of each gate, and the stream after each layer, [layers, T, M], where it is wanted.
    Results run(const at::Tensor& x_TM, const at::Tensor& cos_T1R, const at::Tensor& sin_T1R,
                const std::vector<const BoundPlan*>& plans, const std::vector<at::Tensor>& kvs,
                const std::vector<at::Tensor>& slots_of_experts, const std::vector<at::Tensor>& rows,
                bool wants_hidden) const {
        const size_t count = layers_.size();
        TORCH_CHECK_VALUE(plans.size() == count && kvs.size() == count && slots_of_experts.size() == count &&
                              rows.size() == count,
                          "one plan, cache, table of slots and counter for each of ", count, " layers are needed");
        TORCH_CHECK_VALUE(x_TM.dim() == 2 && x_TM.size(1) == width_, "x must have rows of ", width_, " numbers");
        const int64_t tokens = x_TM.size(0);
        std::vector<LayerStep> steps;
        steps.reserve(count);
        std::vector<at::Tensor> weights;
        weights.reserve(count);
        for (size_t l = 0; l < count; ++l) {
            const StackLayer& layer = layers_[l];
            TORCH_CHECK_VALUE(cos_T1R.numel() == tokens * layer.attention.rotary_width && sin_T1R.numel() == cos_T1R.numel(),
                              "the rotary tables have another shape");
            steps.push_back(step_of(layer, *plans[l], kvs[l], slots_of_experts[l], rows[l], tokens));
            weights.push_back(at::empty({tokens, layer.routing.top_k}, at::TensorOptions(at::kFloat)));
            steps.back().weights_TK = fp32_of(weights.back(), "weights");
        }
        std::optional<at::Tensor> hidden_LTM;
        if (wants_hidden) hidden_LTM = at::empty({static_cast<int64_t>(count), tokens, width_}, x_TM.options());
        const StackStep step = {tokens,
                                width_,
                                bf16_of(x_TM, "x"),
                                fp32_of(cos_T1R, "cos"),
                                fp32_of(sin_T1R, "sin"),
                                hidden_LTM ? bf16_of(*hidden_LTM, "hidden") : nullptr};
        at::Tensor workspace = at::empty({workspace_size(layers_, step)}, x_TM.options());
        bool ok;
        {
            py::gil_scoped_release released;
            ok = run_stack(layers_, steps, step, bf16_of(workspace, "workspace"), num_threads());
        }
        TORCH_CHECK_INDEX(ok, "an expert's slot is not among those of its layer");
        return {weights, hidden_LTM};
    }

  private:
    const at::Tensor& keep(const at::Tensor& tensor) {
        kept_.push_back(tensor);
        return tensor;
    }

    Weight weight(const at::Tensor& packed, int64_t inputs, int64_t columns, const std::optional<at::Tensor>& bias,
                  const char* name) {
        TORCH_CHECK_VALUE(packed.numel() == packed_size(columns, inputs), name, " is packed for another shape than ",
                          columns, " x ", inputs);
        return {bf16_of(keep(packed), name), columns, bias ? bf16_of(keep(*bias), name) : nullptr};
    }

    static LayerStep step_of(const StackLayer& layer, const BoundPlan& plan, const at::Tensor& kv_NCbW,
                             const at::Tensor& slot_E, const at::Tensor& rows_L, int64_t tokens) {
        TORCH_CHECK_VALUE(plan.slot_T.numel() == tokens, "the plan has ", plan.slot_T.numel(), " tokens, x ", tokens);
        TORCH_CHECK_VALUE(kv_NCbW.dim() == 4 && kv_NCbW.size(1) == 2 * layer.attention.kv_heads &&
                              kv_NCbW.size(2) == plan.block_size && kv_NCbW.size(3) == layer.attention.width,
                          "the cache has another shape");
        TORCH_CHECK_VALUE(slot_E.numel() == layer.routing.num_experts && rows_L.numel() == layer.experts.num_slots,
                          "the layout is of other experts");
        return {&plan.pieces,
                data_of<int64_t>(plan.slot_T, at::kLong, "slot"),
                data_of<int32_t>(plan.block_table_SB, at::kInt, "block_table"),
                plan.block_table_SB.size(1),
                plan.block_size,
                bf16_of(kv_NCbW, "the cache"),
                data_of<int64_t>(slot_E, at::kLong, "slot_E"),
                data_of<int64_t>(rows_L, at::kLong, "rows_L"),
                nullptr};
    }

    int64_t width_;
    std::vector<StackLayer> layers_;
    std::vector<at::Tensor> kept_;
};

}  // namespace

void bind_stack(py::module_& module) {
    py::class_<Stack>(module, "Stack").def(py::init<int64_t>()).def("add", &Stack::add).def("run", &Stack::run);
}
