// Functions of vectors.
#pragma once
#include <algorithm>

#include "vec.h"

namespace trimtab::ISA {

// e^x within 2 units in the last place, from 1e-38 to 1e38; below and above it stays there.
inline Vec exp(Vec x) {
    x = x.max(Vec::all(-87.0f)).min(Vec::all(88.0f));
    const Vec shifted = Vec::all(12582912.0f).fma(x, Vec::all(1.44269504f));  // rounds x / ln 2 to a whole number n
    const Vec n = shifted - Vec::all(12582912.0f);
    const Vec r = x - n * Vec::all(0.693359375f) - n * Vec::all(-2.12194440e-4f);  // ln 2 in two parts: r is exact
    Vec p = Vec::all(1.9841270e-4f);
    for (float c : {1.3888889e-3f, 8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f}) p = Vec::all(c).fma(p, r);
    return p * shifted.power();
}

inline float sum(Vec x) {
    float part[Vec::N], all = 0;
    x.store(part);
    for (float p : part) all += p;
    return all;
}

inline float most(Vec x) {
    float part[Vec::N];
    x.store(part);
    return *std::max_element(part, part + Vec::N);
}

// to = f(a, b), the last ones, which fill no vector, too.
template <class F>
inline void each(const float* a, const float* b, float* to, int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + Vec::N <= n; i += Vec::N) f(Vec::load(a + i), Vec::load(b + i)).store(to + i);
    if (i < n) {
        float x[Vec::N] = {}, y[Vec::N] = {};
        std::copy(a + i, a + n, x);
        std::copy(b + i, b + n, y);
        f(Vec::load(x), Vec::load(y)).store(x);
        std::copy_n(x, n - i, to + i);
    }
}

}  // namespace trimtab::ISA
