// megactl._native: torch-free helpers for what is too slow in Python. Every function has a Python twin with identical output.
#include "topics.h"

PYBIND11_MODULE(_native, module) {
    module.doc() = "Compiled index and sample builders, and the log scanner; megactl works without this module, only slower.";
    megactl::native::register_shuffle(module);
    megactl::native::register_sample_index(module);
    megactl::native::register_blending(module);
    megactl::native::register_sentence_pairs(module);
    megactl::native::register_masked_sample(module);
    megactl::native::register_log_scanner(module);
#ifdef MEGACTL_SOURCE_HASH
    module.attr("source_hash") = MEGACTL_SOURCE_HASH;
#endif
}
