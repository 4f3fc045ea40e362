// What each bind_SUBJECT.cpp defines. No headers of torch here, so that module.cpp compiles quickly.
#pragma once

#include <pybind11/pybind11.h>

void bind_attention(pybind11::module_& module);
void bind_tokens(pybind11::module_& module);
void bind_experts(pybind11::module_& module);
void bind_gemm(pybind11::module_& module);
void bind_roofs(pybind11::module_& module);
void bind_stack(pybind11::module_& module);
