// Function multiversioning: the compiler builds a function once for each instruction set and the loader picks one at start-up.
#pragma once

// Only where the loader can pick (glibc's ifunc on x86-64); elsewhere the baseline is compiled. A cloned function must not be a
// template, and what it calls must be MEGACTL_INLINE, or the callee keeps the baseline's instruction set.
#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) && (!defined(__clang__) || __clang_major__ >= 14))
#define MEGACTL_CLONES __attribute__((target_clones("avx512f", "avx2", "default"), noinline))
#else
#define MEGACTL_CLONES __attribute__((noinline))
#endif
