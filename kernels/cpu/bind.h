// What each bind_SUBJECT.cpp defines. No headers of torch here, so that module.cpp compiles quickly.
#pragma once

#include <pybind11/pybind11.h>

void bind_memory(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_gate(pybind11::module_& module);
void bind_norms(pybind11::module_& module);
