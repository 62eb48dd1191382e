// numpy's RandomState in C++: the generator and the draws that the index builders and the masking need, number for number.
//
// Sources: Mersenne Twister MT19937 (Matsumoto and Nishimura 1998); the draws are those of numpy's legacy generator, whose
// stream numpy has frozen.
#pragma once

#include <cstdint>

namespace megactl::native {

constexpr int kStateWords = 624;
constexpr int kMiddleWord = 397;

// All ones up to the highest bit of `limit`.
inline uint64_t mask_of(uint64_t limit) {
    uint64_t mask = limit;
    for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
    return mask;
}

// Works on a key and a position that its owner keeps, so that a stream begun in numpy or in an earlier call goes on.
class Twister {
public:
    Twister(uint32_t* key, int position) : key_(key), position_(position) {}

    // RandomState(seed).
    static Twister seeded(uint32_t* key, uint32_t seed) {
        key[0] = seed;
        for (int i = 1; i < kStateWords; ++i) key[i] = 1812433253u * (key[i - 1] ^ (key[i - 1] >> 30)) + static_cast<uint32_t>(i);
        return Twister(key, kStateWords);
    }

    uint32_t next32() {
        if (position_ == kStateWords) refill();
        uint32_t y = key_[position_++];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        return y ^ (y >> 18);
    }

    // random_sample(): uniform in [0, 1) with 53 bits.
    double uniform() {
        const uint32_t high = next32() >> 5;
        const uint32_t low = next32() >> 6;
        return (high * 67108864.0 + low) / 9007199254740992.0;
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

    // randint(0, limit + 1), for limits below 2^32 - 1. One value needs no draw, and numpy makes none.
    uint64_t at_most(uint64_t limit) { return limit ? bounded(limit, mask_of(limit)) : 0; }

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

}  // namespace megactl::native
