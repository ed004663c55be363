// Unstructured zeros: a bit a place says which of a panel's weights are there; they are spread in registers.
#pragma once
#include <algorithm>

#include "input.h"
#include "tile.h"

namespace trimtab::ISA {

// Floats lie [in, 32]: 32 places an input. bfloat16 lies [in / 2, 32, 2] as in a dense panel: 64 places a pair of inputs.
template <class T>
constexpr int STEP = sizeof(T) == 2 ? 2 : 1;  // inputs of a step

// The next values, each at the place of its bit: 16 floats or 32 bfloat16 a vector, those of a step in turn.
#if defined(__AVX512F__)
inline Vec spread16(uint32_t mask, const float* values) { return {_mm512_maskz_expandloadu_ps(__mmask16(mask), values)}; }
#endif

inline void spread(uint32_t mask, const float*& values, float* to) {
#if defined(__AVX512F__)
    spread16(mask & 0xffff, values).store(to);
    spread16(mask >> 16, values + std::popcount(mask & 0xffff)).store(to + 16);
    values += std::popcount(mask);
#else
    for (int i = 0; i < 32; ++i, mask >>= 1) to[i] = mask & 1 ? *values++ : 0.0f;
#endif
}

inline void spread(uint32_t mask, const uint16_t*& values, uint16_t* to) {
#if defined(__AVX512VBMI2__)
    _mm512_storeu_si512(to, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)));
    values += std::popcount(mask);
#elif defined(__AVX512F__)
    for (int half = 0; half < 2; ++half, mask >>= 16, to += 16) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values));
        _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(__mmask16(mask), wide)));
        values += std::popcount(mask & 0xffff);
    }
#else
    for (int i = 0; i < 32; ++i, mask >>= 1) to[i] = mask & 1 ? peek<uint16_t>(values++) : uint16_t(0);
#endif
}

constexpr int64_t SPREAD = 128;  // inputs that are spread at once: 16 KB, which stays in the first-level cache

inline int64_t bitmask_scratch(const Weights&, int64_t) { return SPREAD * PANEL; }

// Some rows of x: the weights are spread once, for all of them.
template <class T, class X>
inline void spread_panel(const Weights& w, const X* x, int64_t batch, float* y, int64_t p, float* scratch) {
    const T* values = reinterpret_cast<const T*>(w.values) + w.pointers[p];
    const int64_t steps = (w.in + STEP<T> - 1) / STEP<T>;
    const std::byte* bits = w.bits + p * steps * 4 * STEP<T>;
    const int64_t width = sizeof(X) == 2 ? (w.in + 1) / 2 * 2 : w.in;
    T* spaced = reinterpret_cast<T*>(scratch);
    for (int64_t k = 0; k < w.in; k += SPREAD) {
        const int64_t some = std::min(SPREAD, w.in - k), masks = (some + STEP<T> - 1) / STEP<T> * STEP<T>;
        for (int64_t i = 0; i < masks; ++i, bits += 4) spread(peek<uint32_t>(bits), values, spaced + i * 32);
        add_panel(w, spaced, x, width, k, some, batch, y, p);
    }
}

#if defined(__AVX512VBMI2__)
// One row of x: from the stream into the sums.
template <class T, class X>
inline void one_row_spread(const Weights& w, const X* x, float* y, int64_t p) {
    const T* values = reinterpret_cast<const T*>(w.values) + w.pointers[p];
    const std::byte* bits = w.bits + p * ((w.in + STEP<T> - 1) / STEP<T>) * 4 * STEP<T>;
    Tile<PANEL, 1> tile;
    tile.open(y, w.out, 0, true);
    for (int64_t i = 0; i < w.in; i += STEP<T>) {
        __builtin_prefetch(bits + i * 4 + AHEAD / 8);
        __builtin_prefetch(reinterpret_cast<const std::byte*>(values) + AHEAD);
        __builtin_prefetch(reinterpret_cast<const std::byte*>(values) + AHEAD + 64);
        if constexpr (sizeof(T) == 4) {
            const uint32_t mask = peek<uint32_t>(bits + i * 4), low = mask & 0xffff;
            tile.sum[0][0] = tile.sum[0][0].fma(spread16(low, values), Vec::all(x[i]));
            tile.sum[0][1] = tile.sum[0][1].fma(spread16(mask >> 16, values + std::popcount(low)), Vec::all(x[i]));
            values += std::popcount(mask);
        } else {
            for (int v = 0; v < 2; ++v) {
                const uint32_t mask = peek<uint32_t>(bits + (i + v) * 4);
                const Vec pairs{_mm512_castsi512_ps(_mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)))};
                values += std::popcount(mask);
                if constexpr (sizeof(X) == 2) {
                    tile.sum[0][v] = tile.sum[0][v].dot(pairs, Vec::all(peek<float>(x + i)));
                } else {
                    uint16_t both[32];
                    std::memcpy(both, &pairs, sizeof both);
                    tile.sum[0][v] = tile.sum[0][v].fma(Vec::low(both), Vec::all(x[i]));
                    if (i + 1 < w.in) tile.sum[0][v] = tile.sum[0][v].fma(Vec::high(both), Vec::all(x[i + 1]));
                }
            }
        }
    }
    tile.close(y, w.out, p * PANEL);
}
#endif

template <class T, class X>
inline void spread_all(const Weights& w, const X* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
#if defined(__AVX512VBMI2__)
    if (batch == 1) {
        for (int64_t p = begin; p < end; ++p) one_row_spread<T>(w, x, y, p);
        return;
    }
#endif
    for (int64_t p = begin; p < end; ++p) spread_panel<T>(w, x, batch, y, p, scratch);
}

template <class T>
void linear_bitmask(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    spread_all<T>(w, static_cast<const float*>(ready), batch, y, begin, end, scratch);
}

#if defined(__AVX512BF16__)
inline void linear_bitmask_bf16(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    spread_all<uint16_t>(w, static_cast<const uint16_t*>(ready), batch, y, begin, end, scratch);
}
#endif

}  // namespace trimtab::ISA
