// Blocks of one output: it keeps runs of inputs. Rows of x that fill a vector lie side by side, a lane each, and meet one weight
// after the other; rows that are left over meet vectors of weights.
#pragma once
#include "linear_codes.h"

namespace trimtab::ISA {

constexpr int64_t RUN = 32;  // blocks are so many inputs long, or some times that

constexpr int64_t STORED = 16;  // outputs that are stored together

inline Input in_full(const Weights&) { return {Type::f32, 0, Vec::N, 0, true}; }
inline Input in_full_bf16(const Weights&) { return {Type::bf16, 0, Vec::N, 0, true}; }
inline Input in_full_codes(const Weights& w) { return {Type::i8, w.cols, Vec::N, 0, true}; }

inline int64_t row_scratch(const Weights&, int64_t) { return STORED * Vec::N; }

// Calls lanes(first row, output) -> sums, for a vector of rows, and rest<ROWS>(first row, output) for those that are left over.
template <class L, class R>
inline void each_row(const Weights& w, int64_t size, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch, const L& lanes, const R& rest) {
    in_runs(w, KEEP / (w.cols * size), begin, end, [&](int64_t from, int64_t to) {
        int64_t row = 0;
        for (; row + Vec::N <= batch; row += Vec::N) {
            for (int64_t p = from; p < to; p += STORED) {
                const int64_t some = std::min<int64_t>(STORED, to - p);
                for (int64_t i = 0; i < some; ++i) lanes(row, p + i).store(scratch + i * Vec::N);
                for (int64_t r = 0; r < Vec::N; ++r)
                    for (int64_t i = 0; i < some; ++i) y[(row + r) * w.out + p + i] = scratch[i * Vec::N + r];
            }
        }
        for (; row + 4 <= batch; row += 4)
            for (int64_t p = from; p < to; ++p) rest.template operator()<4>(row, p);
        for (; row < batch; ++row)
            for (int64_t p = from; p < to; ++p) rest.template operator()<1>(row, p);
    });
}

inline Vec widen(const float* p) { return Vec::load(p); }
inline Vec widen(const uint16_t* p) { return Vec::bf16(p); }

// A block's weights: T float, uint16_t for bfloat16, or uint8_t for codes.
template <class T>
struct Block {
    const T* values;
    Vec scale, zero;
    Block(const Weights& w, int64_t b) : values(reinterpret_cast<const T*>(w.values) + b * w.cols) {
        if constexpr (sizeof(T) == 1) {
            scale = Vec::all(one_scale(w, b));
            zero = Vec::all(one_zero(w, b));
        }
    }
    // A vector of them from `i` on, as floats; for an x of bfloat16 twice as many, as they are.
    Vec at(int64_t i, const float*) const {
        if constexpr (sizeof(T) == 1) return (Ints::bytes(values + i).floats() - zero) * scale;
        else return widen(values + i);
    }
    Vec at(int64_t i, const uint16_t*) const { return Vec::load(reinterpret_cast<const float*>(values + i)); }
};

inline Vec times(Vec sum, Vec a, Vec b, const float*) { return sum.fma(a, b); }
#if defined(__AVX512BF16__)
inline Vec times(Vec sum, Vec a, Vec b, const uint16_t*) { return sum.dot(a, b); }
#endif

// Inputs of a lane and of a vector, vectors of a run.
template <class X> constexpr int EACH = sizeof(X) == 2 ? 2 : 1;
template <class X> constexpr int WIDE = Vec::N * EACH<X>;
template <class X> constexpr int VECTORS = int(RUN) / WIDE<X>;

// One output for a vector of rows; x [in, Vec::N] of float, [in / 2, Vec::N, 2] of bfloat16.
template <class T, class X>
inline Vec lanes(const Weights& w, const X* x, int64_t p) {
    constexpr int U = 4;  // weights at once, so that no sum waits
    Vec sum[U];
    for (int u = 0; u < U; ++u) sum[u] = Vec::zero();
    for (int64_t b = w.pointers[p]; b < w.pointers[p + 1]; ++b) {
        const Block<T> block(w, b);
        const X* at = x + int64_t(w.columns[b]) * w.cols * Vec::N;
        for (int64_t k = 0; k < w.cols; k += RUN) {
            float part[RUN / EACH<X>];
            for (int u = 0; u < VECTORS<X>; ++u) block.at(k + u * WIDE<X>, x).store(part + u * Vec::N);
            for (int i = 0; i < RUN / EACH<X>; i += U)
                for (int u = 0; u < U; ++u, at += WIDE<X>)
                    sum[u] = times(sum[u], Vec::all(part[i + u]), Vec::load(reinterpret_cast<const float*>(at)), x);
        }
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// One output for ROWS rows (4 or 1) of x [batch, in].
template <class T, class X, int ROWS>
inline void products(const Weights& w, const X* x, int64_t p, float* y) {
    constexpr int V = VECTORS<X>;
    Vec sum[4][V];
    for (int r = 0; r < 4; ++r)
        for (int v = 0; v < V; ++v) sum[r][v] = Vec::zero();
    for (int64_t b = w.pointers[p]; b < w.pointers[p + 1]; ++b) {
        const Block<T> block(w, b);
        for (int64_t k = 0; k < w.cols; k += RUN) {
            const X* at = x + int64_t(w.columns[b]) * w.cols + k;
            for (int v = 0; v < V; ++v) {
                const Vec a = block.at(k + v * WIDE<X>, x);
                for (int r = 0; r < ROWS; ++r)
                    sum[r][v] = times(sum[r][v], a, Vec::load(reinterpret_cast<const float*>(at + r * w.in + v * WIDE<X>)), x);
            }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 1; v < V; ++v) sum[r][0] = sum[r][0] + sum[r][v];
    float all[4];
    Vec::sums(sum[0][0], sum[1][0], sum[2][0], sum[3][0], all);
    for (int r = 0; r < ROWS; ++r) y[r * w.out + p] = all[r];
}

template <class T, class X>
inline void rows_of_blocks(const Weights& w, const X* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    each_row(w, sizeof(T), batch, y, begin, end, scratch,
             [&](int64_t row, int64_t p) { return lanes<T>(w, x + row * w.in, p); },
             [&]<int ROWS>(int64_t row, int64_t p) { products<T, X, ROWS>(w, x + row * w.in, p, y + row * w.out); });
}

template <class T>
void linear_row(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    rows_of_blocks<T>(w, static_cast<const float*>(x), batch, y, begin, end, scratch);
}

#if defined(__AVX512BF16__)
inline void linear_row_bf16(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    rows_of_blocks<uint16_t>(w, static_cast<const uint16_t*>(x), batch, y, begin, end, scratch);
}
#endif

// Codes times x in eight bits, which has a scale for every width of a block.
inline Vec lanes_of_codes(const Weights& w, const Codes& x, int64_t row, int64_t p) {
    Vec total = Vec::zero();
    for (int64_t b = w.pointers[p]; b < w.pointers[p + 1]; ++b) {
        const std::byte* codes = w.values + b * w.cols;
        const int64_t g = w.columns[b], side = row * x.groups + g * Vec::N;
        const int8_t* at = x.x + row * x.stride + g * w.cols * Vec::N;
        Ints sum[2] = {Ints::zero(), Ints::zero()};
        for (int64_t i = 0; i < w.cols; i += 8)
            for (int u = 0; u < 2; ++u)
                sum[u] = sum[u].template dot<8>(Ints::all(peek<int>(codes + i + 4 * u)), Ints::load(at + (i + 4 * u) * Vec::N));
        const Vec whole = sum[0].floats() + sum[1].floats() - Vec::all(one_zero(w, b)) * Vec::load(x.sums + side);
        total = total.fma(whole, Vec::all(one_scale(w, b)) * Vec::load(x.scales + side));
    }
    return total;
}

template <int ROWS>
inline void products_of_codes(const Weights& w, const Codes& x, int64_t row, int64_t p, float* y) {
    constexpr int S = Ints::EIGHT * 4;
    Vec total[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    float zeros[ROWS] = {};  // what the zero points took part in
    for (int64_t b = w.pointers[p]; b < w.pointers[p + 1]; ++b) {
        const std::byte* codes = w.values + b * w.cols;
        const int64_t g = w.columns[b];
        const float scale = one_scale(w, b), zero = one_zero(w, b);
        Ints sum[ROWS];
        for (int r = 0; r < ROWS; ++r) sum[r] = Ints::zero();
        for (int64_t i = 0; i < w.cols; i += S) {
            const Ints a = Ints::eight(codes + i);
            for (int r = 0; r < ROWS; ++r) sum[r] = sum[r].template dot<8>(a, Ints::eight(x.x + (row + r) * x.stride + g * w.cols + i));
        }
        for (int r = 0; r < ROWS; ++r) {
            const float both = scale * x.scales[(row + r) * x.groups + g];
            total[r] = total[r].fma(sum[r].floats(), Vec::all(both));
            zeros[r] += both * zero * x.sums[(row + r) * x.groups + g];
        }
    }
    float all[4];
    Vec::sums(total[0], total[1], total[2], total[3], all);
    for (int r = 0; r < ROWS; ++r) y[r * w.out + p] = all[r] - zeros[r];
}

inline void linear_codes_row(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const Codes x(ready, in_full_codes(w), w.in, batch);
    each_row(w, 1, batch, y, begin, end, scratch,
             [&](int64_t row, int64_t p) { return lanes_of_codes(w, x, row, p); },
             [&]<int ROWS>(int64_t row, int64_t p) { products_of_codes<ROWS>(w, x, row, p, y + row * w.out); });
}

}  // namespace trimtab::ISA
