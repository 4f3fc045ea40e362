// The extension module: one line per subject.
#include <pybind11/pybind11.h>

#include "bind.h"

PYBIND11_MODULE(moestro_cpu, module) {
    bind_memory(module);
    bind_attention(module);
    bind_gate(module);
    bind_norms(module);
}
