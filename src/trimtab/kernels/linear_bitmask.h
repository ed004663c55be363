// Unstructured zeros: of the 32 weights an input has in a panel, a word says which are there; they are spread in registers.
#pragma once
#include <algorithm>

#include "tile.h"

namespace trimtab::ISA {

// The next `popcount(mask)` values, each at the place of its bit, as floats.
inline void spread(uint32_t mask, const uint16_t* values, float* to) {
#if defined(__AVX512VBMI2__)
    const __m512i all = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    _mm512_storeu_si512(to, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(all)), 16));
    _mm512_storeu_si512(to + 16, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(all, 1)), 16));
#elif defined(__AVX512F__)
    const int low = std::popcount(mask & 0xffff);
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(values + low)));
    _mm512_storeu_si512(to, _mm512_slli_epi32(_mm512_maskz_expand_epi32(__mmask16(mask), a), 16));
    _mm512_storeu_si512(to + 16, _mm512_slli_epi32(_mm512_maskz_expand_epi32(__mmask16(mask >> 16), b), 16));
#else
    for (int i = 0; i < PANEL; ++i, mask >>= 1) {
        const uint32_t wide = mask & 1 ? uint32_t(peek<uint16_t>(values++)) << 16 : 0;
        std::memcpy(to + i, &wide, sizeof wide);
    }
#endif
}

inline void spread(uint32_t mask, const float* values, float* to) {
#if defined(__AVX512F__)
    const int low = std::popcount(mask & 0xffff);
    _mm512_storeu_ps(to, _mm512_maskz_expand_ps(__mmask16(mask), _mm512_loadu_ps(values)));
    _mm512_storeu_ps(to + 16, _mm512_maskz_expand_ps(__mmask16(mask >> 16), _mm512_loadu_ps(values + low)));
#else
    for (int i = 0; i < PANEL; ++i, mask >>= 1) to[i] = mask & 1 ? *values++ : 0.0f;
#endif
}

constexpr int64_t SPREAD = 128;  // inputs that are spread at once: 16 KB, which stays in the first-level cache

inline int64_t bitmask_scratch(const Weights&, int64_t) { return SPREAD * PANEL; }

template <class T>
void linear_bitmask(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    for (int64_t p = begin; p < end; ++p) {
        const T* values = reinterpret_cast<const T*>(w.values) + w.pointers[p];
        const std::byte* bits = w.bits + p * w.in * int64_t(sizeof(uint32_t));
        for (int64_t k = 0; k < w.in; k += SPREAD) {
            const int64_t some = std::min(SPREAD, w.in - k);
            for (int64_t i = 0; i < some; ++i) {
                const uint32_t mask = peek<uint32_t>(bits + (k + i) * int64_t(sizeof(uint32_t)));
                spread(mask, values, scratch + i * PANEL);
                values += std::popcount(mask);
            }
            tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
                Tile<PANEL, ROWS> tile;
                tile.open(y + row * w.out, w.out, p * PANEL, k == 0);
                tile.add(scratch, x + row * w.in + k, w.in, some);
                tile.close(y + row * w.out, w.out, p * PANEL);
            });
        }
    }
}

}  // namespace trimtab::ISA
