// The topics of megactl._native. Each .cpp file registers its functions; module.cpp calls every one of these once.
// To add a topic: declare register_<topic> here, define it in <topic>.cpp, call it in module.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace megactl::native {

void register_shuffle(pybind11::module_& module);
void register_sample_index(pybind11::module_& module);
void register_blending(pybind11::module_& module);
void register_sentence_pairs(pybind11::module_& module);
void register_masked_sample(pybind11::module_& module);
void register_log_scanner(pybind11::module_& module);

}  // namespace megactl::native
