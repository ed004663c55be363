// Unstructured zeros, stored in steps: two entries of each of sixteen outputs, which lie in one window of the inputs.
#pragma once
#include <cstdint>

#include "input.h"
#include "tile.h"

namespace trimtab::ISA {

constexpr int SLOTS = SELL_ROWS * SELL_ENTRIES;  // of a step

// A vector of what x [SELL_WINDOW] holds at these places. WHOLE: all of the window may be read.
template <bool WHOLE>
inline Vec looked_up(const float* x, const uint8_t* at) {
#if defined(__AVX512F__)
    if constexpr (WHOLE) {
        const __m512i i = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
        const auto among = [&](const float* from) { return _mm512_permutex2var_ps(_mm512_loadu_ps(from), i, _mm512_loadu_ps(from + 16)); };
        const __mmask16 second = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32)), upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
        return {_mm512_mask_blend_ps(upper, _mm512_mask_blend_ps(second, among(x), among(x + 32)),
                                     _mm512_mask_blend_ps(second, among(x + 64), among(x + 96)))};
    }
#elif defined(__AVX2__)
    return {_mm256_i32gather_ps(x, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at)), 4)};
#endif
    float found[Vec::N];
    for (int i = 0; i < Vec::N; ++i) found[i] = x[at[i]];
    return Vec::load(found);
}

inline Vec values_at(const float* p) { return Vec::load(p); }
inline Vec values_at(const uint16_t* p) { return Vec::bf16(p); }

// What the slots of the steps summed up, put together by outputs.
inline void close_step(const float* slots, float* y, int64_t count) {
    for (int64_t i = 0; i < count; ++i) y[i] = slots[2 * i] + slots[2 * i + 1];
}

// ROWS rows of x for one panel.
template <class T, int ROWS, bool WHOLE>
inline void sell_rows(const Weights& w, const float* x, float* y, int64_t p) {
    constexpr int V = SLOTS / Vec::N;
    const T* values = reinterpret_cast<const T*>(w.values) + w.pointers[p] * SLOTS;
    const uint8_t* at = w.offsets + w.pointers[p] * SLOTS;
    Vec sum[ROWS][V];
    unrolled<ROWS>(EACH(r) { unrolled<V>(EACH(v) { sum[r][v] = Vec::zero(); }); });
    for (int64_t s = w.pointers[p]; s < w.pointers[p + 1]; ++s, values += SLOTS, at += SLOTS) {
        for (int k = 0; k < SLOTS * int(sizeof(T)); k += 64) __builtin_prefetch(reinterpret_cast<const std::byte*>(values) + AHEAD / 2 + k);
        __builtin_prefetch(at + AHEAD / 4);
        const float* window = x + peek<int32_t>(w.bits + s * 4);
        unrolled<V>(EACH(v) {
            const Vec weights = values_at(values + v * Vec::N);
            unrolled<ROWS>(EACH(r) { sum[r][v] = sum[r][v].fma(weights, looked_up<WHOLE>(window + r * w.in, at + v * Vec::N)); });
        });
    }
    unrolled<ROWS>(EACH(r) {
        float slots[SLOTS];
        unrolled<V>(EACH(v) { sum[r][v].store(slots + v * Vec::N); });
        close_step(slots, y + r * w.out + p * SELL_ROWS, std::min<int64_t>(SELL_ROWS, w.out - p * SELL_ROWS));
    });
}

// The two entries of an output in a step, in all lanes.
inline void both(const float* p, Vec& first, Vec& second) {
    first = Vec::all(p[0]);
    second = Vec::all(p[1]);
}
inline void both(const uint16_t* p, Vec& first, Vec& second) {
#if defined(__AVX512F__)
    const __m512i pair = _mm512_set1_epi32(peek<int>(p));
    first.v = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    second.v = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000))));
#else
    const uint32_t pair = peek<uint32_t>(p);
    first = Vec::all(std::bit_cast<float>(pair << 16));
    second = Vec::all(std::bit_cast<float>(pair & 0xffff0000));
#endif
}

// Outputs whose sums registers hold, for V vectors of rows each: a step is a multiple of them.
template <int V>
constexpr int TOGETHER = std::bit_floor(unsigned(Vec::N == 16 ? 16 : 8) / V);

// Steps begin .. end for some outputs, from `first` on, and V vectors of rows, which lie side by side from one input to the next.
// Those `ahead` are asked of memory: the hardware does not follow stretches that are so short.
template <class T, int V>
inline void sell_part(const Weights& w, int64_t begin, int64_t end, int64_t ahead, int64_t first, const float* x, float* sums) {
    constexpr int O = TOGETHER<V>, WIDTH = V * Vec::N;
    Vec sum[O][V];
    unrolled<O>(EACH(o) { unrolled<V>(EACH(v) { sum[o][v] = Vec::load(sums + o * WIDTH + v * Vec::N); }); });
    const T* values = reinterpret_cast<const T*>(w.values) + begin * SLOTS + first * SELL_ENTRIES;
    const uint8_t* at = w.offsets + begin * SLOTS + first * SELL_ENTRIES;
    for (int64_t s = begin; s < end; ++s, values += SLOTS, at += SLOTS) {
        for (int k = 0; k < O * SELL_ENTRIES; k += 64 / int(sizeof(T))) __builtin_prefetch(values + ahead * SLOTS + k);
        __builtin_prefetch(at + ahead * SLOTS);
        const float* window = x + int64_t(peek<int32_t>(w.bits + s * 4)) * WIDTH;
        unrolled<O>(EACH(o) {
            Vec one, two;
            both(values + o * SELL_ENTRIES, one, two);
            const float *first_x = window + size_t(at[o * SELL_ENTRIES]) * WIDTH, *second_x = window + size_t(at[o * SELL_ENTRIES + 1]) * WIDTH;
            unrolled<V>(EACH(v) {
                sum[o][v] = sum[o][v].fma(one, Vec::load(first_x + v * Vec::N));
                sum[o][v] = sum[o][v].fma(two, Vec::load(second_x + v * Vec::N));
            });
        });
    }
    unrolled<O>(EACH(o) { unrolled<V>(EACH(v) { sum[o][v].store(sums + o * WIDTH + v * Vec::N); }); });
}

constexpr int64_t PANELS = 8;  // that go through a stretch of the inputs together, while its x is in the first-level cache

inline int64_t sell_scratch(const Weights&, int64_t) { return PANELS * SELL_ROWS * LANES; }

// Some panels' outputs [panels * 16, V vectors] for V vectors of rows.
template <class T, int V>
inline void sell_lanes(const Weights& w, const float* x, int64_t p, int64_t panels, float* sums) {
    int64_t begin[PANELS];
    std::copy_n(w.pointers + p, panels, begin);
    std::fill_n(sums, panels * SELL_ROWS * V * Vec::N, 0.0f);
    for (int64_t edge = SELL_WINDOW; edge < w.in + SELL_WINDOW; edge += SELL_WINDOW)
        for (int64_t k = 0; k < panels; ++k) {
            int64_t end = begin[k];
            while (end < w.pointers[p + k + 1] && peek<int32_t>(w.bits + end * 4) < edge) ++end;
            const int64_t ahead = begin[(k + 1) % panels] - begin[k];  // what comes next
            if (begin[k] < end)
                for (int64_t i = 0; i < SELL_ROWS; i += TOGETHER<V>) sell_part<T, V>(w, begin[k], end, ahead, i, x, sums + (k * SELL_ROWS + i) * V * Vec::N);
            begin[k] = end;
        }
}

template <class T>
void linear_sell(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* sums) {
    const float* x = static_cast<const float*>(ready);
    const int64_t beside = in_vectors(batch, Vec::N);
    for (int64_t p = begin; p < end; p += PANELS) {  // whose weights stay in the second-level cache while all rows go by
        const int64_t first = p * SELL_ROWS, panels = std::min(PANELS, end - p), some = std::min(panels * SELL_ROWS, w.out - first);
        for (int64_t row = 0, width; row < beside; row += width) {
            width = lanes_at(row, batch).rows;
            if (width == 2 * Vec::N) sell_lanes<T, 2>(w, x + row * w.in, p, panels, sums);
            else if (width == 3 * Vec::N) sell_lanes<T, 3>(w, x + row * w.in, p, panels, sums);
            else if (width == 4 * Vec::N) sell_lanes<T, 4>(w, x + row * w.in, p, panels, sums);
            else sell_lanes<T, 1>(w, x + row * w.in, p, panels, sums);
            for (int64_t r = 0; r < std::min(width, batch - row); ++r)
                for (int64_t i = 0; i < some; ++i) y[(row + r) * w.out + first + i] = sums[i * width + r];
        }
    }
    for (int64_t p = begin; p < end; ++p)
        for (int64_t row = beside; row < batch; ++row) {
            if (w.cols == SELL_WINDOW) sell_rows<T, 1, true>(w, x + row * w.in, y + row * w.out, p);
            else sell_rows<T, 1, false>(w, x + row * w.in, y + row * w.out, p);
        }
}

#if defined(__AVX512BF16__)
// The same for ROWS rows of x in bfloat16: a lane holds both entries of an output, and a register looks up those of a whole step.
template <int ROWS>
inline void sell_rows_bf16(const Weights& w, const uint16_t* x, int64_t stride, float* y, int64_t p) {
    const uint16_t* values = reinterpret_cast<const uint16_t*>(w.values) + w.pointers[p] * SLOTS;
    const uint8_t* at = w.offsets + w.pointers[p] * SLOTS;
    __m512 sum[ROWS][2];
    unrolled<ROWS>(EACH(r) { sum[r][0] = sum[r][1] = _mm512_setzero_ps(); });
    const auto step = [&](int64_t s, auto u) __attribute__((always_inline)) {
        _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD / 2, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD / 4, _MM_HINT_T0);
        const __m512i i = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)at)), weights = _mm512_loadu_si512(values);
        const __mmask32 upper = _mm512_test_epi16_mask(i, _mm512_set1_epi16(64));
        const uint16_t* window = x + peek<int32_t>(w.bits + s * 4);
        unrolled<ROWS>(EACH(r) {
            const auto among = [&](const uint16_t* from) { return _mm512_permutex2var_epi16(_mm512_loadu_si512(from), i, _mm512_loadu_si512(from + 32)); };
            const __m512i met = _mm512_mask_blend_epi16(upper, among(window + r * stride), among(window + r * stride + 64));
            sum[r][u] = _mm512_dpbf16_ps(sum[r][u], (__m512bh)weights, (__m512bh)met);
        });
        values += SLOTS;
        at += SLOTS;
    };
    int64_t s = w.pointers[p];
    for (; s + 2 <= w.pointers[p + 1]; s += 2) {
        step(s, std::integral_constant<int, 0>());
        step(s + 1, std::integral_constant<int, 1>());
    }
    if (s < w.pointers[p + 1]) step(s, std::integral_constant<int, 0>());
    const int64_t first = p * SELL_ROWS;
    const __mmask16 some = __mmask16((1u << std::min<int64_t>(SELL_ROWS, w.out - first)) - 1);
    unrolled<ROWS>(EACH(r) { _mm512_mask_storeu_ps(y + r * w.out + first, some, _mm512_add_ps(sum[r][0], sum[r][1])); });
}

inline void linear_sell_bf16(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float*) {
    const uint16_t* x = static_cast<const uint16_t*>(ready);
    const int64_t stride = (w.in + 1) / 2 * 2;
    for (int64_t p = begin; p < end; ++p) {
        int64_t row = 0;
        for (; row + 4 <= batch; row += 4) sell_rows_bf16<4>(w, x + row * stride, stride, y + row * w.out, p);
        if (row + 2 <= batch) sell_rows_bf16<2>(w, x + row * stride, stride, y + row * w.out, p), row += 2;
        if (row < batch) sell_rows_bf16<1>(w, x + row * stride, stride, y + row * w.out, p);
    }
}
#endif

}  // namespace trimtab::ISA
