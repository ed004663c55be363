// Unstructured zeros met by many rows of x: every weight that is there, with its column, times a vector of rows.
#pragma once
#include "input.h"
#include "tile.h"

namespace trimtab::ISA {

constexpr int CSR_ROWS = 16;  // outputs that are stored together

inline int64_t csr_scratch(const Weights&, int64_t) { return CSR_ROWS * LANES; }

template <class T>
inline float value_at(const T* p) {
    if constexpr (sizeof(T) == 4) return peek<float>(p);
    else return std::bit_cast<float>(uint32_t(peek<uint16_t>(p)) << 16);
}

// One output for V vectors of rows, `width` floats from one input to the next; U weights at once, so that no sum waits.
template <class T, int V, int U>
inline void csr_row(const T* values, const uint16_t* columns, int64_t count, const float* x, int64_t width, float* to) {
    Vec sum[U][V];
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) sum[u][v] = Vec::zero();
    int64_t i = 0;
    for (; i + U <= count; i += U)
        for (int u = 0; u < U; ++u) {
            const Vec w = Vec::all(value_at(values + i + u));
            const float* at = x + int64_t(peek<uint16_t>(columns + i + u)) * width;
            for (int v = 0; v < V; ++v) sum[u][v] = sum[u][v].fma(Vec::load(at + v * Vec::N), w);
        }
    for (; i < count; ++i) {
        const Vec w = Vec::all(value_at(values + i));
        const float* at = x + int64_t(peek<uint16_t>(columns + i)) * width;
        for (int v = 0; v < V; ++v) sum[0][v] = sum[0][v].fma(Vec::load(at + v * Vec::N), w);
    }
    for (int v = 0; v < V; ++v) {
        Vec all = sum[0][v];
        for (int u = 1; u < U; ++u) all = all + sum[u][v];
        all.store(to + v * Vec::N);
    }
}

template <class T>
void linear_csr(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    const T* values = reinterpret_cast<const T*>(w.values);
    const uint16_t* columns = reinterpret_cast<const uint16_t*>(w.bits);
    for (int64_t row = 0; row < batch; row += LANES) {
        const int64_t rows = std::min<int64_t>(LANES, batch - row), width = (rows + Vec::N - 1) / Vec::N * Vec::N;
        for (int64_t p = begin; p < end; p += CSR_ROWS) {
            const int64_t some = std::min<int64_t>(CSR_ROWS, end - p);
            for (int64_t i = 0; i < some; ++i) {
                const int64_t first = w.pointers[p + i], count = w.pointers[p + i + 1] - first;
                float* to = scratch + i * width;
                const float* at = x + row * w.in;
                switch (width / Vec::N) {
                    case 1: csr_row<T, 1, 4>(values + first, columns + first, count, at, width, to); break;
                    case 2: csr_row<T, 2, 2>(values + first, columns + first, count, at, width, to); break;
                    case 3: csr_row<T, 3, 2>(values + first, columns + first, count, at, width, to); break;
                    default: csr_row<T, 4, 1>(values + first, columns + first, count, at, width, to);
                }
            }
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < some; ++i) y[(row + r) * w.out + p + i] = scratch[i * width + r];
        }
    }
}

}  // namespace trimtab::ISA
