// The arithmetic of one AdamW element, shared by the CPU and CUDA kernels. Loshchilov and Hutter, "Decoupled weight decay
// regularization", ICLR 2019; the order of operations is torch.optim.AdamW's, except that
// sqrt(v) is multiplied by 1 / sqrt(1 - beta2^step): in the cache, divisions and roots are what the time goes into.
#pragma once

#include "kernels/philox.h"

namespace megactl {

// What is equal for all elements of a tensor in a step, already in the type of the arithmetic.
template <typename T>
struct AdamW {
    T grad_scale, decay, first, beta2, second, inverse_root_correction, epsilon, step_size;
};

struct AdamWSettings {
    double beta1, beta2, epsilon;
};

// The factor of the weights, which differs from tensor to tensor: norms and biases are not decayed.
template <typename T>
MEGACTL_INLINE T adamw_decay(double lr, double weight_decay) {
    return static_cast<T>(1.0 - lr * weight_decay);
}

// correction1 and correction2 are 1 - beta1^step and 1 - beta2^step. The decay is set for each tensor.
template <typename T>
MEGACTL_INLINE AdamW<T> adamw_constants(const AdamWSettings& s, double lr, double grad_scale, double correction1, double correction2) {
    return {static_cast<T>(grad_scale),
            T(1),
            static_cast<T>(1.0 - s.beta1),
            static_cast<T>(s.beta2),
            static_cast<T>(1.0 - s.beta2),
            static_cast<T>(1.0 / square_root(correction2)),
            static_cast<T>(s.epsilon),
            static_cast<T>(lr / correction1)};
}

#ifdef __CUDACC__
MEGACTL_INLINE float root(float x) { return sqrtf(x); }
MEGACTL_INLINE double root(double x) { return sqrt(x); }
#else
MEGACTL_INLINE float root(float x) { return __builtin_sqrtf(x); }
MEGACTL_INLINE double root(double x) { return __builtin_sqrt(x); }
#endif

template <typename T>
MEGACTL_INLINE void adamw_element(const AdamW<T>& c, T grad, T& weight, T& exp_avg, T& exp_avg_sq) {
    const T g = grad * c.grad_scale;
    const T m = exp_avg + c.first * (g - exp_avg);
    const T v = exp_avg_sq * c.beta2 + c.second * g * g;
    const T denominator = root(v) * c.inverse_root_correction + c.epsilon;
    weight = weight * c.decay - c.step_size * m / denominator;
    exp_avg = m;
    exp_avg_sq = v;
}

}  // namespace megactl
