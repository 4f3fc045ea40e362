// The extension module: one line per subject.
#include <pybind11/pybind11.h>

#include "bind.h"

PYBIND11_MODULE(moestro_cpu, module) {
    bind_attention(module);
    bind_tokens(module);
    bind_experts(module);
    bind_gemm(module);
    bind_roofs(module);
    bind_stack(module);
}
