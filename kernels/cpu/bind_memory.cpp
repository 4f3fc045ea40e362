#include "bind.h"
#include "checks.h"
#include "memory.h"

void bind_memory(pybind11::module_& module) {
    module.def(
        "read_bandwidth",
        [](const at::Tensor& data) {
            TORCH_CHECK_VALUE(data.is_contiguous() && data.is_cpu(), "data must be contiguous and on the CPU");
            return read_all(data.data_ptr(), data.nbytes(), num_threads());
        },
        "Reads all of a tensor with every thread: the exclusive or of its 64-bit words.");
}
