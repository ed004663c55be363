// Norms, rotations, activations and sums: the small work between two linear maps, a row at a time.
#pragma once
#include <algorithm>
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

inline void pass(const float* x, const float* scored, const float* scale, float threshold, int64_t n, float* y) {
    if (scale)
        for (int64_t i = 0; i < n; ++i) y[i] = std::abs(scored[i]) * scale[i] <= threshold ? 0.0f : x[i];
    else
        for (int64_t i = 0; i < n; ++i) y[i] = std::abs(scored[i]) <= threshold ? 0.0f : x[i];
}

inline void add(float* x, const float* y, int64_t n) {
    each(x, y, x, n, [](Vec a, Vec b) { return a + b; });
}

// sum[0 .. COUNT * Vec::N] = row [n] times the rows of m [n, stride].
template <int COUNT>
inline void combine(const float* row, const float* m, int64_t stride, int64_t n, float* to) {
    Vec sums[COUNT];
    for (Vec& s : sums) s = Vec::zero();
    for (int64_t k = 0; k < n; ++k) {
        const Vec x = Vec::all(row[k]);
        for (int i = 0; i < COUNT; ++i) sums[i] = sums[i].fma(x, Vec::load(m + k * stride + i * Vec::N));
    }
    for (int i = 0; i < COUNT; ++i) sums[i].store(to + i * Vec::N);
}

inline void turn(const Turn& t, const float* x, float* y) {
    const int64_t n = t.size, a = t.a, b = t.b, wide = t.wide();
    thread_local std::vector<float> scaled, half;
    if (int64_t(scaled.size()) < n) scaled.resize(size_t(n));
    if (t.before.empty()) std::copy_n(x, n, scaled.data());
    else each(x, t.before.data(), scaled.data(), n, [](Vec v, Vec s) { return v * s; });
    const float* from = scaled.data();
    if (a) {
        if (int64_t(half.size()) < a * wide) half.resize(size_t(a * wide));
        constexpr int COUNT = 16 / Vec::N;
        for (int64_t i = 0; i < a; ++i)
            for (int64_t j = 0; j < wide; j += 16) combine<COUNT>(scaled.data() + i * b, t.right.data() + j, wide, b, half.data() + i * wide + j);
        float some[16];
        for (int64_t i = 0; i < a; ++i)
            for (int64_t j = 0; j < b; j += 16) {
                combine<COUNT>(t.left.data() + i * a, half.data() + j, wide, a, some);
                std::copy_n(some, std::min<int64_t>(16, b - j), scaled.data() + i * b + j);
            }
    }
    if (t.after.empty()) std::copy_n(from, n, y);
    else each(from, t.after.data(), y, n, [](Vec v, Vec s) { return v * s; });
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
