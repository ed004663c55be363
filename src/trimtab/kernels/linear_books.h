// Indices into a book of vectors: an index stands for some outputs of one input. A panel is BESIDE vectors side by side.
#pragma once
#include "input.h"
#include "ints.h"
#include "tile.h"

namespace trimtab::ISA {

constexpr int UNIT = BESIDE * UNIT_INPUTS;  // indices that lie together: vector by vector, four inputs of each
constexpr int64_t SOME = 8;                 // units whose indices are read at once

// So many floats of a vector, in as many registers as that takes.
#if defined(__AVX2__)
struct Four {
    static constexpr int N = 4;
    __m128 v;
    static Four zero() { return {_mm_setzero_ps()}; }
    static Four all(float x) { return {_mm_set1_ps(x)}; }
    static Four load(const float* p) { return {_mm_loadu_ps(p)}; }
    void store(float* p) const { _mm_storeu_ps(p, v); }
    Four fma(Four a, Four b) const { return {_mm_fmadd_ps(a.v, b.v, v)}; }
    Four operator+(Four b) const { return {_mm_add_ps(v, b.v)}; }
};
template <int WIDE> struct PieceOf { using type = Vec; };
template <> struct PieceOf<4> { using type = Four; };
#if defined(__AVX512F__)
struct Eight {
    static constexpr int N = 8;
    __m256 v;
    static Eight zero() { return {_mm256_setzero_ps()}; }
    static Eight all(float x) { return {_mm256_set1_ps(x)}; }
    static Eight load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    Eight fma(Eight a, Eight b) const { return {_mm256_fmadd_ps(a.v, b.v, v)}; }
    Eight operator+(Eight b) const { return {_mm256_add_ps(v, b.v)}; }
};
template <> struct PieceOf<8> { using type = Eight; };
#endif
#else
template <int WIDE> struct PieceOf { using type = Vec; };
#endif
template <int WIDE> using Piece = typename PieceOf<WIDE>::type;

// ---- indices ----------------------------------------------------------------------------------
#if defined(__AVX512F__)
// P bits of each index of a unit, in bytes.
inline __m512i part_of(int p, const std::byte* at) {
    const __m512i by = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    switch (p) {
        case 8: return _mm512_loadu_si512(at);
        case 4: return _mm512_and_si512(_mm512_srlv_epi64(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)at)),
                                                          _mm512_slli_epi64(_mm512_srli_epi64(by, 2), 2)), _mm512_set1_epi8(15));
        case 2: return _mm512_and_si512(_mm512_srlv_epi64(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)at)),
                                                          _mm512_slli_epi64(_mm512_srli_epi64(by, 1), 1)), _mm512_set1_epi8(3));
        default: return _mm512_and_si512(_mm512_srlv_epi64(_mm512_set1_epi64(peek<long long>(at)), by), _mm512_set1_epi8(1));
    }
}
// Up to eight bits of each index of a unit; `at` goes behind them.
inline __m512i byte_of(int bits, const std::byte*& at) {
    __m512i all = _mm512_setzero_si512();
    for (int shift = 0, p = 8; p; p /= 2) {
        if (!(bits & p)) continue;
        const __m512i wide = _mm512_slli_epi64(part_of(p, at), unsigned(shift));  // nothing crosses into the next byte
        all = _mm512_or_si512(all, wide);
        at += 8 * p;
        shift += p;
    }
    return all;
}
inline void indices(int bits, const std::byte* at, uint16_t* to) {
    const __m512i low = byte_of(std::min(bits, 8), at), high = bits > 8 ? byte_of(bits - 8, at) : _mm512_setzero_si512();
    for (int half = 0; half < 2; ++half) {
        const __m256i l = half ? _mm512_extracti64x4_epi64(low, 1) : _mm512_castsi512_si256(low);
        const __m256i h = half ? _mm512_extracti64x4_epi64(high, 1) : _mm512_castsi512_si256(high);
        _mm512_storeu_si512(to + half * 32, _mm512_or_si512(_mm512_cvtepu8_epi16(l), _mm512_slli_epi16(_mm512_cvtepu8_epi16(h), 8)));
    }
}
#else
template <int P>
inline void part_of(const uint8_t* __restrict at, int shift, uint16_t* __restrict to) {
    for (int f = 0; f < 8 / P; ++f)
        for (int i = 0; i < 8 * P; ++i) to[f * 8 * P + i] = uint16_t(to[f * 8 * P + i] | (at[i] >> (P * f) & ((1 << P) - 1)) << shift);
}
inline void indices(int bits, const std::byte* from, uint16_t* to) {
    const uint8_t* at = reinterpret_cast<const uint8_t*>(from);
    std::fill_n(to, UNIT, uint16_t(0));
    for (int shift = 0, left = bits; left;) {
        const int p = left >= 8 ? 8 : left & 4 ? 4 : left & 2 ? 2 : 1;
        if (p == 8) part_of<8>(at, shift, to);
        else if (p == 4) part_of<4>(at, shift, to);
        else if (p == 2) part_of<2>(at, shift, to);
        else part_of<1>(at, shift, to);
        at += 8 * p;
        shift += p;
        left -= p;
    }
}
#endif

// Where the vectors of some units begin, in bytes from the begin of the book's floats.
inline void offsets(const Book& book, const std::byte* at, int64_t units, int wide, uint32_t* to) {
    for (int64_t u = 0; u < units; ++u, at += 8 * book.bits, to += UNIT) {
        uint16_t index[UNIT];
        indices(book.bits, at, index);
        __builtin_prefetch(at + AHEAD);
        __builtin_prefetch(at + AHEAD + 4 * book.bits);
        for (int i = 0; i < UNIT; ++i) to[i] = uint32_t(index[i]) * uint32_t(wide * 4);
    }
}

inline const float* at(const float* floats, uint32_t offset) {
    return reinterpret_cast<const float*>(reinterpret_cast<const std::byte*>(floats) + offset);
}

// ---- x as it is -------------------------------------------------------------------------------
// One row of x: of every index the vector, times the input, to the sums of its outputs.
template <int WIDE, bool TWO>
inline void one_row_books(const Weights& w, const float* x, float* y, int64_t p) {
    using T = Piece<WIDE>;
    constexpr int V = WIDE / T::N;
    constexpr int TOGETHER = std::max(1, std::min(BESIDE, (Vec::N == 16 ? 16 : 8) / V));  // vectors whose sums registers hold
    const int64_t units = (w.in + UNIT_INPUTS - 1) / UNIT_INPUTS;
    const Book &first = w.books[0], &second = w.books[1];
    alignas(64) float sums[BESIDE * WIDE] = {};
    alignas(64) uint32_t one[SOME * UNIT], two[SOME * UNIT];
    float last[UNIT_INPUTS] = {};  // what the last unit meets, and zeros behind it
    std::copy(x + (units - 1) * UNIT_INPUTS, x + w.in, last);
    for (int64_t u = 0; u < units; u += SOME) {
        const int64_t some = std::min(SOME, units - u);
        offsets(first, first.index + (p * units + u) * 8 * first.bits, some, WIDE, one);
        if (TWO) offsets(second, second.index + (p * units + u) * 8 * second.bits, some, WIDE, two);
        for (int g = 0; g < BESIDE; g += TOGETHER) {
            T sum[TOGETHER][V];
            unrolled<TOGETHER>(EACH(i) { unrolled<V>(EACH(v) { sum[i][v] = T::load(sums + (g + i) * WIDE + v * T::N); }); });
            for (int64_t k = 0; k < some; ++k) {
                const float* its = u + k + 1 < units ? x + (u + k) * UNIT_INPUTS : last;
                const uint32_t *a = one + k * UNIT + g * UNIT_INPUTS, *b = two + k * UNIT + g * UNIT_INPUTS;
                for (int j = 0; j < UNIT_INPUTS; ++j) {
                    const T met = T::all(its[j]);
                    unrolled<TOGETHER>(EACH(i) {
                        const float* vector = at(first.floats, a[i * UNIT_INPUTS + j]);
                        unrolled<V>(EACH(v) { sum[i][v] = sum[i][v].fma(T::load(vector + v * T::N), met); });
                        if constexpr (TWO) {
                            const float* more = at(second.floats, b[i * UNIT_INPUTS + j]);
                            unrolled<V>(EACH(v) { sum[i][v] = sum[i][v].fma(T::load(more + v * T::N), met); });
                        }
                    });
                }
            }
            unrolled<TOGETHER>(EACH(i) { unrolled<V>(EACH(v) { sum[i][v].store(sums + (g + i) * WIDE + v * T::N); }); });
        }
    }
    for (int64_t o = p * w.rows, i = 0; i < w.rows && o < w.out; ++i, ++o)
        y[o] = sums[i / w.vector * WIDE + i % w.vector] * Vec::whole(peek<uint16_t>(w.scales + o * 2));
}

// Some units of a panel as floats [inputs, rows]; what a vector is filled up with is written over by the next.
template <int WIDE, bool TWO>
inline void expand_books(const Weights& w, int64_t p, int64_t u, int64_t some, float* to) {
    using T = Piece<WIDE>;
    constexpr int V = WIDE / T::N;
    const int64_t units = (w.in + UNIT_INPUTS - 1) / UNIT_INPUTS;
    const Book &first = w.books[0], &second = w.books[1];
    alignas(64) uint32_t one[SOME * UNIT], two[SOME * UNIT];
    offsets(first, first.index + (p * units + u) * 8 * first.bits, some, WIDE, one);
    if (TWO) offsets(second, second.index + (p * units + u) * 8 * second.bits, some, WIDE, two);
    for (int64_t k = 0; k < some; ++k)
        for (int j = 0; j < UNIT_INPUTS; ++j, to += w.rows)
            for (int i = 0; i < BESIDE; ++i) {
                const int64_t index = k * UNIT + i * UNIT_INPUTS + j;
                unrolled<V>(EACH(v) {
                    T it = T::load(at(first.floats, one[index]) + v * T::N);
                    if constexpr (TWO) it = it + T::load(at(second.floats, two[index]) + v * T::N);
                    it.store(to + i * w.vector + v * T::N);
                });
            }
}

inline int64_t books_scratch(const Weights& w, int64_t batch) { return batch > 1 ? SOME * UNIT_INPUTS * w.rows + 16 : 0; }

template <int WIDE, bool TWO>
void run_books(const Weights& w, const float* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    constexpr int HIGH = 16;  // outputs of a tile: a panel is as many of them as a vector has outputs
    const int64_t units = (w.in + UNIT_INPUTS - 1) / UNIT_INPUTS;
    for (int64_t p = begin; p < end; ++p) {
        if (batch == 1) {
            one_row_books<WIDE, TWO>(w, x, y, p);
            continue;
        }
        for (int64_t u = 0; u < units; u += SOME) {
            expand_books<WIDE, TWO>(w, p, u, std::min(SOME, units - u), scratch);
            const int64_t k = u * UNIT_INPUTS, inputs = std::min(SOME * UNIT_INPUTS, w.in - k);
            tiles<HIGH>(batch, [&]<int ROWS>(int64_t row) {
                for (int64_t o = p * w.rows, s = 0; s < w.vector && o < w.out; ++s, o += HIGH) {
                    Tile<HIGH, ROWS> tile;
                    tile.open(y + row * w.out, w.out, o, k == 0);
                    const float* met = x + row * w.in + k * ROWS;
                    for (int64_t i = 0; i < inputs; ++i) tile.add(scratch + i * w.rows + s * HIGH, met + i * ROWS, 1);
                    tile.close(y + row * w.out, w.out, o);
                }
            });
        }
        for (int64_t r = 0; r < batch; ++r)
            for (int64_t o = p * w.rows; o < std::min((p + 1) * w.rows, w.out); ++o) y[r * w.out + o] *= Vec::whole(peek<uint16_t>(w.scales + o * 2));
    }
}

inline void linear_books(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    const auto run = [&]<int WIDE>() {
        if (w.books[1].bits) run_books<WIDE, true>(w, x, batch, y, begin, end, scratch);
        else run_books<WIDE, false>(w, x, batch, y, begin, end, scratch);
    };
    if (w.wide == 4) run.template operator()<4>();
    else if (w.wide == 8) run.template operator()<8>();
    else run.template operator()<16>();
}

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
// ---- x in eight bits --------------------------------------------------------------------------
// Vectors in eight bits: four inputs of an output are a lane, whose products are summed up at once. Columns are lanes that lie together.
inline Input in_rows(const Weights& w) { return {Type::i8, std::min(w.in, GROUP), 0}; }
inline bool in_bytes(const Weights& w) { return w.books[0].bytes; }
inline bool by_lookup(const Weights& w) { return w.books[0].bits <= 8 && w.books[1].bits <= 8; }
inline int columns_of(const Weights& w) { return by_lookup(w) ? w.vector : BESIDE / 2; }
constexpr int64_t GROUP_UNITS = GROUP / UNIT_INPUTS;

inline int64_t codes_books_scratch(const Weights& w, int64_t batch) {
    return batch * columns_of(w) * Vec::N + (by_lookup(w) ? 0 : GROUP_UNITS * BESIDE / 2 * 16);
}

// Of COUNT registers of bytes those that indices say; of no more than one the lowest six bits count.
template <int COUNT>
struct Lookup {
    __m512i table[COUNT];
    explicit Lookup(const uint8_t* p) {
        for (int i = 0; i < COUNT; ++i) table[i] = _mm512_loadu_si512(p + 64 * i);
    }
    __m512i operator()(__m512i index, __mmask64 upper) const {
        if constexpr (COUNT == 1) return _mm512_permutexvar_epi8(index, table[0]);
        else return _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(table[0], index, table[1]), _mm512_permutex2var_epi8(table[2], index, table[3]));
    }
};
template <>
struct Lookup<0> {
    explicit Lookup(const uint8_t*) {}
    __m512i operator()(__m512i, __mmask64) const { return _mm512_setzero_si512(); }
};

// Indices of some units as bytes, and what is asked of memory while they are gone through: as much again, in so many steps.
struct Bytes {
    const std::byte* at;
    const std::byte* next;
    int64_t step;
};
inline Bytes bytes_of(const Book& book, int64_t unit, int64_t units, int passes, std::byte* room) {
    if (!book.bits) return {};
    const std::byte* at = book.index + unit * 8 * book.bits;
    const Bytes found{book.bits == 8 ? at : room, at + units * 8 * book.bits, (8 * book.bits + passes - 1) / passes};
    if (book.bits != 8)
        for (int64_t u = 0; u < units; ++u) _mm512_store_si512(room + u * UNIT, byte_of(book.bits, at));
    return found;
}

// What x met, less what the codes' zero, 128, met.
inline void add_column(float* total, Ints sum, float scale, float met) {
    Vec::load(total).fma(sum.floats() - Vec::all(128 * met), Vec::all(scale)).store(total);
}

// Outputs k .. k + OUTPUTS of the vectors, the last one again where there are fewer.
template <int FIRST, int SECOND, int ROWS, int OUTPUTS>
inline void add_outputs(const Weights& w, Bytes one, Bytes two, int64_t units, const Codes& x, int64_t row, int64_t g, int k, float* total) {
    const int8_t* from = x.x + row * x.stride + g * GROUP;
    const auto last = [&](int i) { return std::min(k + i, w.vector - 1); };
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        const Lookup<FIRST> a[] = {Lookup<FIRST>(w.books[0].bytes + last(I) * FIRST * 64)...};
        const Lookup<SECOND> b[] = {Lookup<SECOND>(w.books[1].bytes + last(I) * SECOND * 64)...};
        Ints sum[OUTPUTS][ROWS];
        unrolled<ROWS>(EACH(r) { ((sum[I][r] = Ints::zero()), ...); });
        for (int64_t u = 0; u < units; ++u) {
            __builtin_prefetch(one.next + u * one.step);
            const __m512i first = _mm512_loadu_si512(one.at + u * UNIT);
            const __mmask64 upper = _mm512_movepi8_mask(first);
            __m512i its[] = {a[I](first, upper)...};
            if constexpr (SECOND > 0) {
                __builtin_prefetch(two.next + u * two.step);
                const __m512i second = _mm512_loadu_si512(two.at + u * UNIT);
                const __mmask64 above = _mm512_movepi8_mask(second);
                ((its[I] = _mm512_add_epi8(its[I], b[I](second, above))), ...);
            }
            unrolled<ROWS>(EACH(r) {
                const Ints met = Ints::all(peek<int>(from + r * x.stride + u * UNIT_INPUTS));
                ((sum[I][r] = sum[I][r].template dot<8>(Ints{its[I]}, met)), ...);
            });
        }
        // With constants: sums that a loop indexes are kept in memory while they grow, at half the speed.
        unrolled<OUTPUTS>(EACH(i) {
            if (k + i < w.vector)
                unrolled<ROWS>(EACH(r) {
                    const int64_t at = (row + r) * x.groups + g;
                    add_column(total + ((row + r) * w.vector + k + i) * Vec::N, sum[i][r], x.scales[at], x.sums[at]);
                });
        });
    }(std::make_integer_sequence<int, OUTPUTS>());
}

// Books of no more than eight bits: a byte of every index is an output's weight, out of registers; as many outputs at once as these hold.
template <int FIRST, int SECOND, int ROWS>
inline void add_lookups(const Weights& w, Bytes one, Bytes two, int64_t units, const Codes& x, int64_t row, int64_t g, float* total) {
    constexpr int MOST = ROWS == 1 && FIRST + SECOND <= 5 ? 4 : 2;
    for (int k = 0; k < w.vector;) {
        if (MOST == 4 && w.vector - k > 2) {
            add_outputs<FIRST, SECOND, ROWS, MOST>(w, one, two, units, x, row, g, k, total);
            k += MOST;
        } else {
            add_outputs<FIRST, SECOND, ROWS, 2>(w, one, two, units, x, row, g, k, total);
            k += 2;
        }
        one.next += units * one.step;
        two.next += units * two.step;
    }
}

// Larger books: vectors of eight bytes from memory, of two vectors side by side and four inputs, turned so that inputs lie together.
inline __m512i eight_of(const uint8_t* bytes, const uint16_t* index) {
    const auto pair = [&](int i) {
        const __m128d low = _mm_load_sd(reinterpret_cast<const double*>(bytes + index[i] * 8));
        return _mm_castpd_si128(_mm_loadh_pd(low, reinterpret_cast<const double*>(bytes + index[i + 1] * 8)));
    };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(pair(0)), pair(2), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(pair(4)), pair(6), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Calls f(unit, column, its bytes) for units of a panel.
template <bool TWO, class F>
inline void each_column(const Weights& w, int64_t unit, int64_t units, const F& f) {
    const Book &first = w.books[0], &second = w.books[1];
    alignas(64) static constexpr auto TURNED = [] {
        struct { uint8_t at[64]; } t{};
        for (int i = 0; i < 64; ++i) t.at[i] = uint8_t(i / 32 * 32 + i % 4 * 8 + i % 32 / 4);
        return t;
    }();
    const __m512i turned = _mm512_load_si512(TURNED.at);
    alignas(64) uint16_t one[SOME * UNIT], two[SOME * UNIT];  // ready before they are wanted
    for (int64_t from = 0; from < units; from += SOME) {
        const int64_t some = std::min(SOME, units - from);
        for (int64_t u = 0; u < some; ++u) {
            const std::byte* at = first.index + (unit + from + u) * 8 * first.bits;
            __builtin_prefetch(at + AHEAD);
            __builtin_prefetch(at + AHEAD + 64);
            indices(first.bits, at, one + u * UNIT);
            if (TWO) indices(second.bits, second.index + (unit + from + u) * 8 * second.bits, two + u * UNIT);
        }
        for (int64_t u = 0; u < some; ++u)
            unrolled<BESIDE / 2>(EACH(c) {
                __m512i it = eight_of(first.bytes, one + u * UNIT + c * 8);
                if constexpr (TWO) it = _mm512_add_epi8(it, eight_of(second.bytes, two + u * UNIT + c * 8));
                f(from + u, c, _mm512_permutexvar_epi8(turned, it));
            });
    }
}

template <bool TWO>
inline void add_gathered(const Weights& w, int64_t unit, int64_t units, const Codes& x, int64_t batch, int64_t g, float* total, float* room) {
    constexpr int C = BESIDE / 2;
    if (batch == 1) {
        Ints sum[C];
        unrolled<C>(EACH(c) { sum[c] = Ints::zero(); });
        each_column<TWO>(w, unit, units, [&](int64_t u, auto c, __m512i its) __attribute__((always_inline)) {
            sum[c] = sum[c].template dot<8>(Ints{its}, Ints::all(peek<int>(x.x + g * GROUP + u * UNIT_INPUTS)));
        });
        unrolled<C>(EACH(c) { add_column(total + c * Vec::N, sum[c], x.scales[g], x.sums[g]); });
        return;
    }
    each_column<TWO>(w, unit, units, [&](int64_t u, int c, __m512i its) { _mm512_storeu_si512(room + (c * GROUP_UNITS + u) * 16, its); });
    const auto rows_of = [&]<int ROWS>(int64_t row) {
        const int8_t* from = x.x + row * x.stride + g * GROUP;
        for (int c = 0; c < C; ++c) {
            Ints sum[ROWS];
            unrolled<ROWS>(EACH(r) { sum[r] = Ints::zero(); });
            for (int64_t u = 0; u < units; ++u) {
                const Ints its = Ints::load(room + (c * GROUP_UNITS + u) * 16);
                unrolled<ROWS>(EACH(r) { sum[r] = sum[r].template dot<8>(its, Ints::all(peek<int>(from + r * x.stride + u * UNIT_INPUTS))); });
            }
            unrolled<ROWS>(EACH(r) {
                const int64_t at = (row + r) * x.groups + g;
                add_column(total + ((row + r) * C + c) * Vec::N, sum[r], x.scales[at], x.sums[at]);
            });
        }
    };
    int64_t row = 0;
    for (; row + 8 <= batch; row += 8) rows_of.template operator()<8>(row);
    for (; row < batch; ++row) rows_of.template operator()<1>(row);
}

inline void linear_codes_books(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* total) {
    const Codes x(ready, in_rows(w), w.in, batch);
    const bool lookup = by_lookup(w);
    const int columns = columns_of(w), passes = (w.vector + 3) / 4;
    const int64_t units = (w.in + UNIT_INPUTS - 1) / UNIT_INPUTS, size = batch * columns * Vec::N;
    alignas(64) std::byte one[GROUP_UNITS * UNIT], two[GROUP_UNITS * UNIT];
    for (int64_t p = begin; p < end; ++p) {
        std::fill_n(total, size, 0.0f);
        for (int64_t g = 0; g < x.groups; ++g) {
            const int64_t first = p * units + g * GROUP_UNITS, some = std::min(GROUP_UNITS, units - g * GROUP_UNITS);
            if (!lookup) {
                if (w.books[1].bits) add_gathered<true>(w, first, some, x, batch, g, total, total + size);
                else add_gathered<false>(w, first, some, x, batch, g, total, total + size);
                continue;
            }
            const Bytes a = bytes_of(w.books[0], first, some, passes, one), b = bytes_of(w.books[1], first, some, passes, two);
            const auto run = [&]<int FIRST, int SECOND>() {
                int64_t row = 0;
                for (; row + 4 <= batch; row += 4) add_lookups<FIRST, SECOND, 4>(w, a, b, some, x, row, g, total);
                for (; row < batch; ++row) add_lookups<FIRST, SECOND, 1>(w, a, b, some, x, row, g, total);
            };
            const bool large = w.books[0].tables() > 64, more = w.books[1].tables() > 64;
            if (!w.books[1].bits) large ? run.template operator()<4, 0>() : run.template operator()<1, 0>();
            else if (more) large ? run.template operator()<4, 4>() : run.template operator()<1, 4>();
            else large ? run.template operator()<4, 1>() : run.template operator()<1, 1>();
        }
        for (int64_t r = 0; r < batch; ++r)
            for (int64_t vector = 0, o = p * w.rows; vector < BESIDE; ++vector)
                for (int64_t k = 0; k < w.vector && o < w.out; ++k, ++o) {
                    const int64_t at = lookup ? k * Vec::N + vector : vector / 2 * Vec::N + vector % 2 * 8 + k;
                    y[r * w.out + o] = total[r * columns * Vec::N + at] * w.step * Vec::whole(peek<uint16_t>(w.scales + o * 2));
                }
    }
}
#endif

}  // namespace trimtab::ISA
