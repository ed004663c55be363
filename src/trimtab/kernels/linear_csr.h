// Unstructured zeros met by many rows of x: every weight that is there, with its column, times vectors of rows.
#pragma once
#include "input.h"
#include "tile.h"

namespace trimtab::ISA {

// The weights of one output inside a tile for V vectors of rows, which lie side by side from one input to the next; U weights
// at once, so that no sum waits. What they give is added to `sums`, or put there.
template <int V, int U>
inline void csr_part(const float* values, const uint8_t* columns, int64_t count, const float* x, float* sums, bool fresh) {
    static_assert(CSR_FILL % U == 0);
    Vec sum[U][V];
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < V; ++v) sum[u][v] = Vec::zero();
    for (int64_t i = 0; i < count; i += U)
        for (int u = 0; u < U; ++u) {
            const Vec w = Vec::all(peek<float>(values + i + u));
            const float* at = x + columns[i + u] * (V * Vec::N);
            for (int v = 0; v < V; ++v) sum[u][v] = sum[u][v].fma(Vec::load(at + v * Vec::N), w);
        }
    for (int v = 0; v < V; ++v) {
        Vec all = sum[0][v];
        for (int u = 1; u < U; ++u) all = all + sum[u][v];
        if (!fresh) all = all + Vec::load(sums + v * Vec::N);
        all.store(sums + v * Vec::N);
    }
}

// Values as floats, where they are not, at `to`, which has room for a vector more than there are.
inline const float* widened(const float* values, int64_t, float*) { return values; }
inline const float* widened(const uint16_t* values, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + Vec::N <= count; i += Vec::N) Vec::bf16(values + i).store(to + i);
    for (; i < count; ++i) to[i] = std::bit_cast<float>(uint32_t(peek<uint16_t>(values + i)) << 16);
    return to;
}

// A panel's outputs [rows, V vectors]: tile after tile, while the tile's inputs of x lie in the first-level cache.
template <class T, int V, int U>
inline void csr_panel(const Weights& w, const float* x, int64_t p, float* sums) {
    float wide[CSR_COLS];
    const int64_t tiles = (w.in + CSR_COLS - 1) / CSR_COLS, first = w.pointers[p];
    const T* values = reinterpret_cast<const T*>(w.values) + first;
    const uint8_t* columns = w.offsets + first;
    const std::byte* counts = w.bits + p * tiles * CSR_ROWS * 2;
    for (int64_t t = 0; t < tiles; ++t, x += CSR_COLS * V * Vec::N) {
        for (int64_t i = 0; i < CSR_ROWS; ++i, counts += 2) {
            const int64_t count = peek<uint16_t>(counts);
            __builtin_prefetch(reinterpret_cast<const std::byte*>(values) + AHEAD);
            csr_part<V, U>(widened(values, count, wide), columns, count, x, sums + i * V * Vec::N, t == 0);
            values += count;
            columns += count;
        }
    }
}

inline int64_t csr_scratch(const Weights&, int64_t) { return CSR_ROWS * LANES; }

template <class T>
void linear_csr(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* sums) {
    const float* x = static_cast<const float*>(ready);
    for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * CSR_ROWS, some = std::min<int64_t>(CSR_ROWS, w.out - first);
        for (int64_t row = 0; row < batch; row += LANES) {
            const int64_t rows = std::min<int64_t>(LANES, batch - row), width = (rows + Vec::N - 1) / Vec::N * Vec::N;
            switch (width / Vec::N) {
                case 1: csr_panel<T, 1, 4>(w, x + row * w.in, p, sums); break;
                case 2: csr_panel<T, 2, 2>(w, x + row * w.in, p, sums); break;
                case 3: csr_panel<T, 3, 2>(w, x + row * w.in, p, sums); break;
                default: csr_panel<T, 4, 1>(w, x + row * w.in, p, sums);
            }
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < some; ++i) y[(row + r) * w.out + first + i] = sums[i * width + r];
        }
    }
}

}  // namespace trimtab::ISA
