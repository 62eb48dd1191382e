// numpy's RandomState.shuffle, number for number, at the speed of memory rather than of cache misses.
//
// The bounded draw (mask and reject, see twister.h) and the loop from n-1 down to 1 are those of numpy's legacy generator.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "topics.h"
#include "twister.h"

namespace py = pybind11;

namespace megactl::native {
namespace {

// The draws do not depend on the data, so a block of them is made ahead and its targets prefetched: the swaps that follow
// hit the cache. A plain loop waits for memory at nearly every swap once the array outgrows the cache.
template <typename T>
void shuffle(T* values, int64_t count, Twister& random) {
    constexpr int64_t kBlock = 1024;
    int64_t targets[kBlock];
    uint64_t mask = mask_of(static_cast<uint64_t>(std::max<int64_t>(count - 1, 0)));
    for (int64_t last = count - 1; last >= 1;) {
        const int64_t steps = std::min(kBlock, last);
        for (int64_t k = 0; k < steps; ++k) {
            const auto limit = static_cast<uint64_t>(last - k);
            if (limit <= mask >> 1) mask >>= 1;
            targets[k] = static_cast<int64_t>(random.bounded(limit, mask));
            __builtin_prefetch(values + targets[k], 1);
        }
        for (int64_t k = 0; k < steps; ++k) std::swap(values[last - k], values[targets[k]]);
        last -= steps;
    }
}

template <typename T>
int shuffle_array(py::array& array, uint32_t* key, int position) {
    auto* values = static_cast<T*>(array.mutable_data());
    const int64_t count = array.size();
    py::gil_scoped_release release;
    Twister random(key, position);
    shuffle(values, count, random);
    return random.position();
}

int shuffle_entry(py::array array, py::array_t<uint32_t, py::array::c_style> key, int position) {
    if (array.ndim() != 1 || !(array.flags() & py::array::c_style)) throw std::invalid_argument("array must be 1-D and contiguous");
    if (key.size() != kStateWords || position < 0 || position > kStateWords) throw std::invalid_argument("not a state of MT19937");
    if (array.itemsize() == 4) return shuffle_array<uint32_t>(array, key.mutable_data(), position);
    if (array.itemsize() == 8) return shuffle_array<uint64_t>(array, key.mutable_data(), position);
    throw std::invalid_argument("array must hold 4- or 8-byte items");
}

}  // namespace

void register_shuffle(py::module_& module) {
    module.def("shuffle", &shuffle_entry, py::arg("array").noconvert(), py::arg("key").noconvert(), py::arg("position"),
               "Shuffle in place as numpy.random.RandomState would from this key; updates key, returns the new position.");
}

}  // namespace megactl::native
