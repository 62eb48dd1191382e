// numpy's RandomState.shuffle, number for number, at the speed of memory rather than of cache misses.
//
// Sources: Mersenne Twister MT19937 (Matsumoto and Nishimura 1998); the bounded draw (mask and reject) and the loop
// from n-1 down to 1 are those of numpy's legacy generator, whose stream numpy has frozen.
#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

#include "topics.h"

namespace py = pybind11;

namespace megactl::native {
namespace {

constexpr int kStateWords = 624;
constexpr int kMiddleWord = 397;

// Continues a generator whose key and position come from numpy, so that draws before and after agree with numpy's.
class Twister {
public:
    Twister(uint32_t* key, int position) : key_(key), position_(position) {}

    uint32_t next32() {
        if (position_ == kStateWords) refill();
        uint32_t y = key_[position_++];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        return y ^ (y >> 18);
    }

    // Uniform in [0, limit]. 32 bits are drawn where they suffice: numpy does so, and the stream depends on it.
    uint64_t bounded(uint64_t limit, uint64_t mask) {
        uint64_t value;
        if (limit <= 0xffffffffu) {
            do { value = next32() & mask; } while (value > limit);
        } else {
            do {
                const uint64_t high = next32();
                value = ((high << 32) | next32()) & mask;
            } while (value > limit);
        }
        return value;
    }

    int position() const { return position_; }

private:
    static uint32_t mix(uint32_t upper, uint32_t lower) {
        const uint32_t y = (upper & 0x80000000u) | (lower & 0x7fffffffu);
        return (y >> 1) ^ (-(lower & 1u) & 0x9908b0dfu);
    }

    void refill() {
        for (int i = 0; i < kStateWords - kMiddleWord; ++i) key_[i] = key_[i + kMiddleWord] ^ mix(key_[i], key_[i + 1]);
        for (int i = kStateWords - kMiddleWord; i < kStateWords - 1; ++i)
            key_[i] = key_[i + kMiddleWord - kStateWords] ^ mix(key_[i], key_[i + 1]);
        key_[kStateWords - 1] = key_[kMiddleWord - 1] ^ mix(key_[kStateWords - 1], key_[0]);
        position_ = 0;
    }

    uint32_t* key_;
    int position_;
};

uint64_t mask_of(uint64_t limit) {
    uint64_t mask = limit;
    for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
    return mask;
}

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
