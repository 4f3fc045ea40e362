#include "bind.h"
#include "checks.h"
#include "roofs.h"

void bind_roofs(pybind11::module_& module) {
    module.def(
        "read_bandwidth",
        [](const at::Tensor& data) {
            TORCH_CHECK_VALUE(data.is_contiguous() && data.is_cpu(), "data must be contiguous and on the CPU");
            return read_all(data.data_ptr(), data.nbytes(), num_threads());
        },
        "Reads all of a tensor with every thread: the exclusive or of its 64-bit words.");
    module.def(
        "multiply_in_registers", [](int64_t rounds) { return multiply_in_registers(rounds, num_threads()); },
        "24 independent vdpbf16ps per round and thread: 1536 floating point operations.");
}
