// CPU kernels over Philox: raw words, normal deviates, dropout with an optional residual. Each handles a run of consecutive elements
// of one stream; the caller splits tensors into runs and runs over threads.
#pragma once

#include <cstdint>

#include "kernels/cpu/clones.h"
#include "kernels/dtype.h"
#include "kernels/philox.h"

namespace megactl::cpu {

// Blocks drawn at a time: enough to fill vector registers, few enough for the words to stay in the first-level cache.
constexpr int kBlocks = 64;
constexpr int kWords = 4 * kBlocks;

MEGACTL_INLINE void draw(const Stream& stream, uint64_t first_block, uint32_t words[kWords]) {
    for (int j = 0; j < kBlocks; ++j) philox(stream, first_block + static_cast<uint64_t>(j), words + 4 * j);
}

// Calls use(words, from, count, done) for the pieces of elements [first, first + n): element first + done + i has words[from + i].
// kEach elements a block; draw_blocks(block, words) fills in those of kBlocks blocks.
template <int kEach, typename Draw, typename Use>
MEGACTL_INLINE void for_each_piece(const Draw& draw_blocks, uint64_t first, int64_t n, const Use& use) {
    constexpr int kRoom = kEach * kBlocks;
    alignas(64) uint32_t words[kRoom];
    int64_t done = 0;
    uint64_t block = first / kEach;
    int from = static_cast<int>(first % kEach);
    while (done < n) {
        draw_blocks(block, words);
        const int64_t room = kRoom - from;
        const int count = static_cast<int>(n - done < room ? n - done : room);
        use(words, from, count, done);
        done += count;
        block += kBlocks;
        from = 0;
    }
}

MEGACTL_CLONES static void bits(const Stream& stream, uint64_t first, int64_t n, int64_t* out) {
    const auto words_of = [&](uint64_t block, uint32_t* words) __attribute__((always_inline)) { draw(stream, block, words); };
    for_each_piece<4>(words_of, first, n, [&](const uint32_t* words, int from, int count, int64_t done) __attribute__((always_inline)) {
        for (int i = 0; i < count; ++i) out[done + i] = words[from + i];
    });
}

template <typename T>
MEGACTL_INLINE void normal_run(const Stream& stream, uint64_t first, int64_t n, double std, T* out) {
    const auto words_of = [&](uint64_t block, uint32_t* words) __attribute__((always_inline)) { draw(stream, block, words); };
    for_each_piece<4>(words_of, first, n, [&](const uint32_t* words, int from, int count, int64_t done) __attribute__((always_inline)) {
        using C = typename Compute<T>::type;
        alignas(64) double z[kWords];
        for (int j = 0; j < kWords / 2; ++j) box_muller(words[2 * j], words[2 * j + 1], z + 2 * j, z + 2 * j + 1);
        for (int i = 0; i < count; ++i) out[done + i] = Store<T>::from(static_cast<C>(z[from + i] * std));
    });
}

// The 32 bits of each element of the `count` blocks from `first_block`. Lower halves that do not matter are all ones.
MEGACTL_INLINE void draw_for_dropout(const Stream& stream, uint64_t first_block, uint32_t threshold, uint32_t bits[2 * kWords]) {
    alignas(64) uint32_t words[kWords];
    draw(stream, first_block, words);
    const uint32_t upper = threshold & 0xffff0000u;
    uint32_t ties = 0;
    for (int j = 0; j < kWords; ++j) {
        const uint32_t low = words[j] << 16, high = words[j] & 0xffff0000u;
        bits[2 * j] = low | 0xffffu, bits[2 * j + 1] = high | 0xffffu;
        ties |= static_cast<uint32_t>(low == upper) | static_cast<uint32_t>(high == upper);
    }
    if (!ties) return;
    draw(drop_ties(stream), first_block, words);
    for (int j = 0; j < 2 * kWords; ++j) {
        if ((bits[j] & 0xffff0000u) == upper) bits[j] = upper | half_word(words + (j >> 3) * 4, j & 7);
    }
}

// y = residual + (bits >= threshold ? x * scale : 0); residual may be null.
template <typename T>
MEGACTL_INLINE void dropout_run(const Stream& stream, uint64_t first, int64_t n, uint32_t threshold, double scale, const T* x,
                                const T* residual, T* y) {
    using C = typename Compute<T>::type;
    const C factor = static_cast<C>(scale);
    const auto drop = [&](uint64_t block, uint32_t* bits) __attribute__((always_inline)) { draw_for_dropout(stream, block, threshold, bits); };
    for_each_piece<8>(drop, first, n, [&](const uint32_t* words, int from, int count, int64_t done) __attribute__((always_inline)) {
        const T* xs = x + done;
        T* ys = y + done;
        if (residual) {
            const T* rs = residual + done;
            for (int i = 0; i < count; ++i) {
                const C kept = words[from + i] >= threshold ? load(xs[i]) * factor : C(0);
                ys[i] = Store<T>::from(load(rs[i]) + kept);
            }
        } else {
            for (int i = 0; i < count; ++i) ys[i] = Store<T>::from(words[from + i] >= threshold ? load(xs[i]) * factor : C(0));
        }
    });
}

#define MEGACTL_RANDOM_KERNELS(T)                                                                                          \
    MEGACTL_CLONES static void normal(const Stream& stream, uint64_t first, int64_t n, double std, T* out) {               \
        normal_run(stream, first, n, std, out);                                                                            \
    }                                                                                                                      \
    MEGACTL_CLONES static void dropout_add(const Stream& stream, uint64_t first, int64_t n, uint32_t threshold,            \
                                           double scale, const T* x, const T* residual, T* y) {                            \
        dropout_run(stream, first, n, threshold, scale, x, residual, y);                                                   \
    }
MEGACTL_RANDOM_KERNELS(double)
MEGACTL_RANDOM_KERNELS(float)
MEGACTL_RANDOM_KERNELS(BFloat16)
MEGACTL_RANDOM_KERNELS(Float16)
#undef MEGACTL_RANDOM_KERNELS

}  // namespace megactl::cpu
