// Norms, rotations, activations and sums: the small work between two linear maps, a row at a time.
#pragma once
#include <cmath>

#include "ops.h"
#include "vecmath.h"

namespace trimtab::ISA {

inline void rms(const float* x, const float* weight, int64_t n, float eps, float* y) {
    Vec squares = Vec::zero();
    int64_t i = 0;
    for (; i + Vec::N <= n; i += Vec::N) squares = squares.fma(Vec::load(x + i), Vec::load(x + i));
    float all = sum(squares);
    for (; i < n; ++i) all += x[i] * x[i];
    const Vec factor = Vec::all(1.0f / std::sqrt(all / float(n) + eps));
    each(x, weight, y, n, [&](Vec a, Vec w) { return a * factor * w; });
}

inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

inline void add(float* x, const float* y, int64_t n) {
    each(x, y, x, n, [](Vec a, Vec b) { return a + b; });
}

// x * sigmoid(z): silu is that of z = x, gelu in its tanh form that of a cubic.
inline Vec gated(Vec x, Vec z) { return x / (Vec::all(1.0f) + exp(Vec::zero() - z)); }

inline void activate(Activation f, const float* gate, float* x, int64_t n) {
    const float* from = gate ? gate : x;
    auto with = [&](const auto& g) {
        if (gate) each(from, x, x, n, [&](Vec a, Vec b) { return g(a) * b; });
        else each(from, x, x, n, [&](Vec a, Vec) { return g(a); });
    };
    if (f == Activation::silu) {
        with([](Vec a) { return gated(a, a); });
    } else if (f == Activation::gelu_tanh) {
        with([](Vec a) { return gated(a, Vec::all(1.5957691216f) * (a + Vec::all(0.044715f) * a * a * a)); });
    } else if (f == Activation::relu) {
        with([](Vec a) { return a.max(Vec::zero()); });
    } else {
        for (int64_t i = 0; i < n; ++i) {
            const float a = 0.5f * from[i] * (1.0f + std::erf(from[i] * 0.70710678f));
            x[i] = gate ? a * x[i] : a;
        }
    }
}

}  // namespace trimtab::ISA
