// Input after input, the weights of all outputs one after the other: what no row of x meets with anything but zero is not read.
//
// A few rows of x go over the columns they meet, some side by side, and ask for the next ones meanwhile: no hardware foresees which ones
// these are, and waiting for them would keep what is to be multiplied from being so. Threads divide the inputs, for the longer a column is
// read the better, and what they add up to lies in the first-level cache. Many rows meet nearly all: then slabs of some inputs and outputs
// become what dense panels are, and while one is multiplied the next is asked for.
#pragma once
#include "linear_expand.h"
#include "linear_row.h"

namespace trimtab::ISA {

constexpr int HALF = 64;        // of codes of four bits: output o and o + 64 share a byte

inline int64_t stripes(const Weights& w) { return w.panels() * STRIPE; }

// Sums of some rows, [ROWS, stride]; the first is of output `begin`.
template <class T, int ROWS>
struct Sums {
    T* at;
    int64_t stride, begin = 0;
    T* operator()(int r, int64_t o) const { return at + r * stride + o - begin; }
    void clear(int64_t from, int64_t to) const {
        for (int r = 0; r < ROWS; ++r) std::fill((*this)(r, from), (*this)(r, to), T(0));
    }
};

// Which of 16 inputs are met, bit by bit.
inline uint32_t met_of(const float* x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(_mm512_loadu_si512(x), _mm512_set1_epi32(0x7fffffff));
#elif defined(__AVX2__)
    const auto eight = [](const float* p) {
        const __m256i its = _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 1);
        return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(its, _mm256_setzero_si256()))));
    };
    return (eight(x) | eight(x + 8) << 8) ^ 0xffff;
#else
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= uint32_t(peek<uint32_t>(x + i) << 1 != 0) << i;
    return bits;
#endif
}
inline uint32_t met_of(const int8_t* x) {
#if defined(__AVX2__)
    const __m128i its = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(its, _mm_setzero_si128()))) ^ 0xffff;
#else
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= uint32_t(x[i] != 0) << i;
    return bits;
#endif
}

// f(i) for those of inputs i .. to of one row of x that are met.
template <class X, class F>
inline void each_met(const X* x, int64_t i, int64_t to, const F& f) {
    for (; i + 16 <= to; i += 16)
        for (uint32_t bits = met_of(x + i); bits; bits &= bits - 1) f(i + std::countr_zero(bits));
    for (; i < to; ++i)
        if (x[i] != 0) f(i);  // true of what is no number
}

// What the rows of a tile meet: `count` inputs, rising, and what x is there, [count, ROWS].
struct Met {
    int32_t* inputs;
    float* x;
    int64_t count = 0;
};

// A column is skipped where the bits of x, the sign aside, are zero in all rows: what is no number is not.
template <int ROWS>
inline void meet(const float* x, int64_t from, int64_t to, Met& met) {
    int64_t n = 0;
    if constexpr (ROWS == 1) {
        each_met(x, from, to, [&](int64_t i) { met.x[n] = x[i], met.inputs[n++] = int32_t(i); });
        met.count = n;
        return;
    }
    x += from * ROWS;
    for (int64_t i = from; i < to; ++i, x += ROWS) {
        uint32_t any = 0;
        for (int r = 0; r < ROWS; ++r) {
            met.x[n * ROWS + r] = x[r];
            any |= peek<uint32_t>(x + r);
        }
        met.inputs[n] = int32_t(i);
        n += (any & 0x7fffffff) != 0;
    }
    met.count = n;
}

// Bytes of a slab, of which two stay in the second-level cache while rows of x go by; inputs of one of codes, and inputs that are made dense at
// a time; bytes between its panels, which would else all fall into the same places of the first-level cache.
constexpr int64_t SLAB = 256 << 10, DEEP = 1024, AT_ONCE = 8, BETWEEN = 64;

// Bytes of a panel of codes of four or eight bits: whole groups of x.
inline int64_t deep_codes(const Weights& w) { return std::max<int64_t>(1, DEEP / group_of(w)) * group_of(w); }
inline int64_t apart_codes(const Weights& w) {
    const int64_t inputs = unit_inputs(w.type);
    return (deep_codes(w) + inputs - 1) / inputs * 4 * PANEL + BETWEEN;
}
// Outputs of a slab of codes.
inline int64_t wide_codes(const Weights& w) { return std::max<int64_t>(1, SLAB / ((apart_codes(w) - BETWEEN) * STRIPE / PANEL)) * STRIPE; }
// One of floats is a stripe wide: inputs, and values from panel to panel.
template <class T>
constexpr int64_t DEEP_FLOATS = SLAB / (STRIPE * int64_t(sizeof(T)));
template <class T>
constexpr int64_t APART = DEEP_FLOATS<T> * PANEL + BETWEEN / int64_t(sizeof(T));

inline int64_t columns_scratch(const Weights& w, int64_t batch) {
    const int64_t codes = code_bits(w.type) ? apart_codes(w) * wide_codes(w) / PANEL : 0, floats = SLAB + STRIPE / PANEL * BETWEEN;
    const int64_t many = total_scratch<PANEL>(w, batch) + 2 * std::max(codes, floats) / 4 + SLACK;
    return batch > FEW ? many : FEW * (stripes(w) + w.in) + (w.in + w.in / 8 + 64) * (1 + FEW) + 64;
}

// Outputs begin .. end of TOGETHER columns from the first one on.
template <class T, int ROWS, int TOGETHER>
inline void add_some(const Weights& w, const Met& met, int64_t first, int64_t begin, int64_t end, Sums<float, ROWS> sums) {
    constexpr int V = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1, STEP = V * Vec::N;
    const int64_t stride = stripes(w);
    const T* at[TOGETHER];
    for (int c = 0; c < TOGETHER; ++c) at[c] = reinterpret_cast<const T*>(w.values) + met.inputs[first + c] * stride;
    const float* x = met.x + first * ROWS;
    const T* next[TOGETHER];
    for (int c = 0; c < TOGETHER; ++c) next[c] = reinterpret_cast<const T*>(w.values) + met.inputs[std::min(first + TOGETHER + c, met.count - 1)] * stride;
    for (int64_t o = begin; o < end; o += STEP) {
        for (int c = 0; c < TOGETHER; ++c)
            for (int line = 0; line < STEP * int(sizeof(T)); line += 64) __builtin_prefetch(reinterpret_cast<const std::byte*>(next[c] + o) + line);
        Vec sum[ROWS][V];
        unrolled<ROWS>(EACH(r) { unrolled<V>(EACH(v) { sum[r][v] = Vec::load(sums(r, o + v * Vec::N)); }); });
        unrolled<TOGETHER>(EACH(c) {
            unrolled<V>(EACH(v) {
                const Vec its = widen(at[c] + o + v * Vec::N);
                unrolled<ROWS>(EACH(r) { sum[r][v] = sum[r][v].fma(its, Vec::all(x[c * ROWS + r])); });
            });
        });
        unrolled<ROWS>(EACH(r) { unrolled<V>(EACH(v) { sum[r][v].store(sums(r, o + v * Vec::N)); }); });
    }
}

// Of `ROWS` rows of x (1, 2 or 4), what a region adds up to: `to` [ROWS, outputs filled up].
template <class T, int ROWS>
inline void few_rows(const Weights& w, const float* x, const Region& in, float* to, float* scratch) {
    const Sums<float, ROWS> sums{to, stripes(w)};
    Met met{reinterpret_cast<int32_t*>(scratch), scratch + w.in + 1};
    meet<ROWS>(x, in.from, in.to, met);
    sums.clear(in.begin, in.end);
    int64_t i = 0;
    for (; i + 4 <= met.count; i += 4) add_some<T, ROWS, 4>(w, met, i, in.begin, in.end, sums);
    for (; i < met.count; ++i) add_some<T, ROWS, 1>(w, met, i, in.begin, in.end, sums);
}

template <class T>
void columns_part(const Weights& w, const void* ready, int64_t batch, const Region& in, float* sums, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        if constexpr (ROWS <= FEW) few_rows<T, ROWS>(w, x + row * w.in, in, sums + row * stripes(w), scratch);
    });
}

// Inputs k .. k + count of some panels from output o on, which become dense.
struct Slab { int64_t k, count, o, panels; };

// Outputs begin .. end in slabs of `wide`: pack(slab, from, until, to) makes inputs k + from .. k + until dense, multiply<ROWS>(row, slab,
// panel, at) is called for every tile of x and every panel. `some(k)` says how many inputs there are from k on. The next slab is made while
// one is multiplied, a few inputs at a time, and what those need is asked for before.
template <class Some, class Pack, class Multiply>
inline void in_slabs(const Weights& w, int64_t wide, std::byte* at, std::byte* other, int64_t batch, int64_t begin, int64_t end, const Some& some,
                     const Pack& pack, const Multiply& multiply) {
    const auto slab = [&](int64_t k, int64_t o) { return Slab{k, some(k), o, (std::min({o + wide, end, w.out}) - o + PANEL - 1) / PANEL}; };
    const auto part = [&](const Slab& s, int64_t i, std::byte* to) { pack(s, i * AT_ONCE, std::min(s.count, (i + 1) * AT_ONCE), to); };
    int64_t count = 0;
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t) { ++count; });
    Slab now = slab(0, begin);
    pack(now, 0, now.count, at);
    for (;;) {
        Slab next{};
        if (now.k + now.count < w.in) next = slab(now.k + now.count, now.o);
        else if (now.o + wide < std::min(end, w.out)) next = slab(0, now.o + wide);
        const int64_t parts = (next.count + AT_ONCE - 1) / AT_ONCE, steps = count * now.panels;
        int64_t step = 0, done = 0;
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            for (int64_t p = 0; p < now.panels; ++p) {
                for (++step; done * steps < parts * step; ++done) part(next, done, other);
                multiply.template operator()<ROWS>(row, now, p, at);
            }
        });
        if (!next.count) return;
        now = next;
        std::swap(at, other);
    }
}

// Inputs i .. until of a slab in turn, or in pairs, as dense panels have them.
inline void dense_panels(const Weights& w, const Slab& s, int64_t i, int64_t until, float* to) {
    const int64_t stride = stripes(w);
    const float* from = reinterpret_cast<const float*>(w.values) + s.k * stride + s.o;
    for (; i < until; ++i)
        for (int64_t p = 0; p < s.panels; ++p) {
            const float* at = from + i * stride + p * PANEL;
            for (int o = 0; o < PANEL; o += 16) __builtin_prefetch(at + AT_ONCE * stride + o, 0, 2);
            std::copy_n(at, PANEL, to + p * APART<float> + i * PANEL);
        }
}
inline void dense_panels(const Weights& w, const Slab& s, int64_t i, int64_t until, uint16_t* to) {
    const int64_t stride = stripes(w);
    const uint16_t* from = reinterpret_cast<const uint16_t*>(w.values) + s.k * stride + s.o;
    for (; i < until; i += 2) {
        const uint16_t *a = from + i * stride, *b = a + (i + 1 < until ? stride : 0);
        for (int64_t p = 0; p < s.panels; ++p, a += PANEL, b += PANEL) {
            __builtin_prefetch(a + AT_ONCE * stride, 0, 2);
            __builtin_prefetch(b + AT_ONCE * stride, 0, 2);
            uint16_t first[PANEL], second[PANEL];
            std::copy_n(a, PANEL, first);
            std::copy_n(b, PANEL, second);
            uint32_t pairs[PANEL];
            for (int o = 0; o < PANEL; ++o) pairs[o] = first[o] | uint32_t(second[o]) << 16;
            std::memcpy(to + p * APART<uint16_t> + i * PANEL, pairs, sizeof pairs);
        }
    }
}

// Panels of floats, or of bfloat16, times rows of x, `width` units of X long.
template <class T, class X>
inline auto times_slab(const Weights& w, const X* x, int64_t width, float* y) {
    return [=, &w]<int ROWS>(int64_t row, const Slab& s, int64_t p, const std::byte* at) {
        add_tile<ROWS>(w, reinterpret_cast<const T*>(at) + p * APART<T>, x, width, s.k, s.count, row, y, s.o / PANEL + p);
    };
}

template <class T, class X>
inline void many_rows(const Weights& w, const X* x, int64_t width, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    std::byte* slab = reinterpret_cast<std::byte*>(scratch);
    in_slabs(w, STRIPE, slab, slab + APART<T> * sizeof(T) * STRIPE / PANEL, batch, begin * STRIPE, end * STRIPE,
             [&](int64_t k) { return std::min(DEEP_FLOATS<T>, w.in - k); },
             [&](const Slab& s, int64_t i, int64_t until, std::byte* to) { dense_panels(w, s, i, until, reinterpret_cast<T*>(to)); },
             times_slab<T>(w, x, width, y));
}

#if defined(__AVX512BF16__)
inline Input columns_bf16(const Weights&) { return {Type::bf16, 0, tile_rows<PANEL>()}; }

// x was rounded to bfloat16: for a few rows, which wait for memory, it becomes floats again.
inline void columns_part_bf16(const Weights& w, const void* ready, int64_t batch, const Region& in, float* sums, float* scratch) {
    const uint16_t* x = static_cast<const uint16_t*>(ready);
    float *as_floats = scratch, *rest = scratch + FEW * w.in;
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        if constexpr (ROWS <= FEW) {
            const uint16_t* from = x + row * (w.in + w.in % 2);
            for (int64_t i = in.from; i < in.to; ++i)
                for (int r = 0; r < ROWS; ++r) as_floats[i * ROWS + r] = std::bit_cast<float>(uint32_t(from[(i / 2 * ROWS + r) * 2 + i % 2]) << 16);
            few_rows<uint16_t, ROWS>(w, as_floats, in, sums + row * stripes(w), rest);
        }
    });
}

inline void linear_columns_bf16(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    many_rows<uint16_t>(w, static_cast<const uint16_t*>(x), w.in + w.in % 2, batch, y, begin, end, scratch);
}
#endif

template <class T>
void linear_columns(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    many_rows<T>(w, static_cast<const float*>(x), w.in, batch, y, begin, end, scratch);
}

// ---- codes ------------------------------------------------------------------------------------
// Inputs in fours, each four of one group of x: what x is there, [quads, ROWS] words; the last four of a group are filled up with zeros of
// x. `until` says where each group ends.
struct Quads {
    int32_t* inputs;
    int32_t* x;
    int64_t count = 0;
};

// Codes of four bits are multiplied where they lie in their byte, if products of whole bytes can be summed up: a byte, and what it has
// above its lower four bits.
template <int BITS>
constexpr bool whole_bytes() {
#if defined(__AVX512VNNI__)
    return BITS == 4;
#else
    return false;
#endif
}

// Outputs begin .. end of TOGETHER times four columns times x. They lie in the sums in the order that `settle` undoes.
template <int BITS, int ROWS, int TOGETHER>
inline void add_quads(const Weights& w, const Quads& quads, int64_t q, int64_t begin, int64_t end, Sums<int32_t, ROWS> sums) {
    constexpr int PARTS = BITS == 4 ? 2 : 1;
    const int64_t stride = stripes(w) * BITS / 8;
    const std::byte *at[TOGETHER][4], *next[TOGETHER][4];
    Ints x[TOGETHER][ROWS];
    for (int t = 0; t < TOGETHER; ++t)
        for (int c = 0; c < 4; ++c) {
            at[t][c] = w.values + quads.inputs[4 * (q + t) + c] * stride;
            next[t][c] = w.values + quads.inputs[4 * std::min(q + TOGETHER + t, quads.count - 1) + c] * stride;
        }
    unrolled<TOGETHER>(EACH(t) { unrolled<ROWS>(EACH(r) { x[t][r] = Ints::all(quads.x[(q + t) * ROWS + r]); }); });
    // Of codes of four bits a line is two halves of a stripe.
    for (int64_t to = begin, o = to * BITS / 8; to < end; o += 4 * Vec::N, to += o % HALF || BITS == 8 ? 4 * Vec::N : 4 * Vec::N + HALF) {
        Ints codes[TOGETHER][4];
        unrolled<TOGETHER>(EACH(t) {
            unrolled<4>(EACH(c) {
                __builtin_prefetch(next[t][c] + o);
                codes[t][c] = Ints::load(at[t][c] + o);
            });
            Ints::beside(codes[t]);
        });
        unrolled<PARTS>(EACH(p) {
            unrolled<4>(EACH(k) {
                Ints its[TOGETHER];
                unrolled<TOGETHER>(EACH(t) {
                    if constexpr (BITS == 8) its[t] = codes[t][k];
                    else if constexpr (whole_bytes<BITS>()) its[t] = p ? codes[t][k] & int(0xf0f0f0f0) : codes[t][k];
                    else its[t] = (p ? codes[t][k] >> 4 : codes[t][k]) & 0x0f0f0f0f;
                });
                unrolled<ROWS>(EACH(r) {
                    int32_t* sum = sums(r, to + p * HALF + k * Vec::N);
                    Ints all = Ints::load(sum);
                    unrolled<TOGETHER>(EACH(t) { all = all.template dot<whole_bytes<BITS>() ? 8 : BITS>(its[t], x[t][r]); });
                    all.store(sum);
                });
            });
        });
    }
}

// Four vectors of sums from output o on, in the order of outputs, which are made zero.
template <int BITS, int ROWS>
inline void take_sums(Sums<int32_t, ROWS> codes, int r, int64_t o, Vec (&to)[4]) {
    Ints four[4];
    unrolled<4>(EACH(k) {
        int32_t* sum = codes(r, o + k * Vec::N);
        four[k] = Ints::load(sum);
#if defined(__AVX512VNNI__)
        // The upper half of a stripe was multiplied by 16, and is in the lower one's sums as well, which come first.
        if (whole_bytes<BITS>() && o % STRIPE < HALF) four[k] = {_mm512_sub_epi32(four[k].v, Ints::load(sum + HALF).v)};
#endif
        Ints::zero().store(sum);
    });
    Ints::straight(four);
    unrolled<4>(EACH(k) { to[k] = four[k].floats(); });
    if (whole_bytes<BITS>() && o % STRIPE >= HALF) unrolled<4>(EACH(k) { to[k] = to[k] * Vec::all(1.0f / 16); });
}

// What the codes of a group added up to goes, with their scales and less the zero points, to the sums; `met` is what x sums up to.
template <int BITS, int ROWS>
inline void settle(const Weights& w, int64_t side, int64_t begin, int64_t end, Sums<int32_t, ROWS> codes, const float* met, const float* step,
                   Sums<float, ROWS> sums) {
    const auto with = [&](auto zero, auto scale) {  // what they are is asked once
        for (int64_t o = begin; o < end; o += 4 * Vec::N)
            unrolled<ROWS>(EACH(r) {
                Vec four[4];
                take_sums<BITS, ROWS>(codes, r, o, four);
                unrolled<4>(EACH(k) {
                    const int64_t at = side + o + k * Vec::N;
                    float* to = sums(r, o + k * Vec::N);
                    Vec::load(to).fma(four[k] - zero(at) * Vec::all(met[r]), scale(at) * Vec::all(step[r])).store(to);
                });
            });
    };
    const auto scaled = [&](auto zero) {
        if (w.scale_type == Type::f32) with(zero, [at = reinterpret_cast<const float*>(w.scales)](int64_t i) { return Vec::load(at + i); });
        else with(zero, [at = reinterpret_cast<const uint16_t*>(w.scales)](int64_t i) { return Vec::f16(at + i); });
    };
    if (w.zeros) scaled([at = w.zeros](int64_t i) { return Ints::bytes(at + i).floats(); });
    else scaled([](int64_t) { return Vec::all(middle<BITS>()); });
}

template <int BITS, int ROWS>
inline void few_rows_codes(const Weights& w, const Codes& x, int64_t group, int64_t row, const Region& in, float* to, float* scratch) {
    const Sums<float, ROWS> sums{to, stripes(w)};
    const Sums<int32_t, ROWS> ints{reinterpret_cast<int32_t*>(scratch), in.end - in.begin, in.begin};
    scratch += ROWS * stripes(w);
    Quads quads{reinterpret_cast<int32_t*>(scratch), reinterpret_cast<int32_t*>(scratch + w.in + w.in / 8 + 64)};
    thread_local std::vector<int64_t> until;
    until.clear();
    const int8_t* codes = x.x + row * x.stride;
    int8_t* its = reinterpret_cast<int8_t*>(quads.x);
    int64_t n = 0;
    for (int64_t from = in.from, last; from < in.to; from = last) {
        last = std::min(in.to, (from / group + 1) * group);
        if constexpr (ROWS == 1) each_met(codes, from, last, [&](int64_t i) { its[n] = codes[i], quads.inputs[n++] = int32_t(i); });
        else for (int64_t i = from; i < last; ++i) {
            int any = 0;
            for (int r = 0; r < ROWS; ++r) {
                const int8_t code = codes[(i / 4 * ROWS + r) * 4 + i % 4];
                its[(n / 4 * ROWS + r) * 4 + n % 4] = code;
                any |= code;
            }
            quads.inputs[n] = int32_t(i);
            n += any != 0;
        }
        for (; n % 4; ++n) {
            quads.inputs[n] = quads.inputs[n - 1];
            for (int r = 0; r < ROWS; ++r) its[(n / 4 * ROWS + r) * 4 + n % 4] = 0;
        }
        until.push_back(n / 4);
    }
    quads.count = n / 4;
    sums.clear(in.begin, in.end);
    ints.clear(in.begin, in.end);
    int64_t q = 0;
    for (size_t part = 0; part < until.size(); ++part) {
        const int64_t g = in.from / group + int64_t(part), last = until[part];
        const float* scale = x.scales + row * x.groups + g;  // of row r `x.groups` further on
        float step[ROWS], met[ROWS] = {};
        for (int r = 0; r < ROWS; ++r) {
            step[r] = scale[r * x.groups];
            if (step[r] != step[r]) std::fill(sums(r, in.begin), sums(r, in.end), step[r]);  // what is no number has no codes, and is not lost
        }
        if (q == last) continue;
        const int64_t side = (w.groups() > 1 ? g : 0) * stripes(w), size = w.scale_type == Type::f32 ? 4 : 2;
        for (int64_t o = in.begin; o < in.end; o += 64 / size) __builtin_prefetch(w.scales + (side + o) * size);
        for (int64_t i = q; i < last; ++i)
            for (int r = 0; r < ROWS; ++r)
                for (int b = 0; b < 4; ++b) met[r] += its[(i * ROWS + r) * 4 + b];
        for (; q + 2 <= last; q += 2) add_quads<BITS, ROWS, 2>(w, quads, q, in.begin, in.end, ints);
        for (; q < last; ++q) add_quads<BITS, ROWS, 1>(w, quads, q, in.begin, in.end, ints);
        settle<BITS, ROWS>(w, side, in.begin, in.end, ints, met, step, sums);
    }
}

inline Input columns_codes(const Weights& w) { return {Type::i8, group_of(w), tile_rows<PANEL>()}; }

template <int BITS>
void columns_codes_part(const Weights& w, const void* ready, int64_t batch, const Region& in, float* sums, float* scratch) {
    const Input input = columns_codes(w);
    const Codes x(ready, input, w.in, batch);
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        if constexpr (ROWS <= FEW) few_rows_codes<BITS, ROWS>(w, x, input.group, row, in, sums + row * stripes(w), scratch);
    });
}

// Four vectors of bytes, one an input, become words of outputs in turn: [4, Vec::N].
inline void words_of(Ints (&four)[4], std::byte* to, int64_t apart) {
    Ints::beside(four);
    Ints::straight(four);
    unrolled<4>(EACH(k) { four[k].store(to + k * Vec::N / PANEL * apart + k * Vec::N % PANEL * 4); });
}

// Inputs i .. until of a slab in words, as dense panels have them, `apart` bytes a panel.
template <int BITS>
inline void words_of_panels(const Weights& w, const Slab& s, int64_t i, int64_t until, std::byte* to, int64_t apart) {
    constexpr int P = 32 / BITS, WIDE = 4 * Vec::N;  // inputs of a word, bytes of a line
    const int64_t stride = stripes(w) * BITS / 8, end = (s.o + s.panels * PANEL + STRIPE - 1) / STRIPE * STRIPE;
    for (to += i / P * 4 * PANEL; i < until; i += P, to += 4 * PANEL) {
        const std::byte* at[P];
        for (int j = 0; j < P; ++j) at[j] = w.values + (s.k + std::min(i + j, until - 1)) * stride;  // x is zero behind the last one
        for (int64_t b = s.o * BITS / 8; b < end * BITS / 8; b += WIDE) {
            Ints lines[P];
            unrolled<P>(EACH(j) {
                __builtin_prefetch(at[j] + b + AT_ONCE * stride, 0, 2);
                lines[j] = Ints::load(at[j] + b);
            });
            const auto place = [&](int64_t output) { return to + (output - s.o) / PANEL * apart + (output - s.o) % PANEL * 4; };
            if constexpr (BITS == 8) {
                words_of(lines, place(b), apart);
            } else {
                const int64_t output = b / HALF * STRIPE + b % HALF;
                Ints low[4], high[4];
                unrolled<4>(EACH(j) {
                    low[j] = (lines[j] & 0x0f0f0f0f) | ((lines[j + 4] & 0x0f0f0f0f) << 4);
                    high[j] = ((lines[j] >> 4) & 0x0f0f0f0f) | (lines[j + 4] & int(0xf0f0f0f0));
                });
                words_of(low, place(output), apart);
                words_of(high, place(output + HALF), apart);
            }
        }
    }
}

template <int BITS>
void linear_columns_codes(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* total) {
    const Input input = columns_codes(w);
    const Codes x(ready, input, w.in, batch);
    constexpr int P = 32 / BITS;
    const int64_t group = input.group, deep = deep_codes(w), apart = apart_codes(w), wide = wide_codes(w);
    std::byte* slab = reinterpret_cast<std::byte*>(total + total_scratch<PANEL>(w, batch));
    in_slabs(w, wide, slab, slab + apart * wide / PANEL, batch, begin * STRIPE, end * STRIPE, [&](int64_t k) { return std::min(deep, w.in - k); },
             [&](const Slab& s, int64_t i, int64_t until, std::byte* to) { words_of_panels<BITS>(w, s, i, until, to, apart); },
             [&]<int ROWS>(int64_t row, const Slab& s, int64_t p, const std::byte* at) {
                 const int64_t first = s.o + p * PANEL;
                 if (s.k) take_total<PANEL, ROWS>(total, w, y + row * w.out, first);
                 else open_total<PANEL, ROWS>(total);
                 for (int64_t from = s.k, last; from < s.k + s.count; from = last) {
                     last = std::min(s.k + s.count, from + group);
                     const int64_t g = from / group;
                     add_codes<BITS, PANEL, ROWS>(total, w, at + p * apart + (from - s.k) / P * 4 * PANEL, (last - from + P - 1) / P, x, row, from, g,
                                                  (w.groups() > 1 ? g : 0) * stripes(w) + first);
                 }
                 close_total<PANEL, ROWS>(total, w, y + row * w.out, first);
             });
}

// ---- codes, x as it is ------------------------------------------------------------------------
// Some columns of group g, as floats; their scale comes last.
template <int BITS, int ROWS>
inline void add_expanded(const Weights& w, const Met& met, int64_t first, int64_t count, int64_t g, int64_t begin, int64_t end,
                         Sums<float, ROWS> sums) {
    const int64_t stride = stripes(w) * BITS / 8, side = g * stripes(w);
    float all[ROWS] = {};
    for (int64_t i = first; i < first + count; ++i)
        for (int r = 0; r < ROWS; ++r) all[r] += met.x[i * ROWS + r];
    for (int64_t o = begin; o < end; o += Vec::N) {
        const int64_t line = BITS == 8 ? o : o / STRIPE * HALF + o % HALF;
        const int shift = BITS == 8 ? 0 : int(o % STRIPE / HALF * 4);
        Vec sum[ROWS];
        unrolled<ROWS>(EACH(r) { sum[r] = Vec::zero(); });
        for (int64_t i = first; i < first + count; ++i) {
            const uint8_t* at = reinterpret_cast<const uint8_t*>(w.values) + met.inputs[i] * stride + line;
            const Vec its = ((Ints::bytes(at) >> shift) & (BITS == 8 ? 255 : 15)).floats();
            unrolled<ROWS>(EACH(r) { sum[r] = sum[r].fma(its, Vec::all(met.x[i * ROWS + r])); });
        }
        unrolled<ROWS>(EACH(r) {
            const Vec whole = sum[r] - zero_at<BITS>(w, side + o) * Vec::all(all[r]);
            Vec::load(sums(r, o)).fma(whole, scale_at(w, side + o)).store(sums(r, o));
        });
    }
}

template <int BITS>
void columns_expand_part(const Weights& w, const void* ready, int64_t batch, const Region& in, float* to, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        if constexpr (ROWS <= FEW) {
            const Sums<float, ROWS> sums{to + row * stripes(w), stripes(w)};
            Met met{reinterpret_cast<int32_t*>(scratch), scratch + w.in + 1};
            meet<ROWS>(x + row * w.in, in.from, in.to, met);
            sums.clear(in.begin, in.end);
            for (int64_t i = 0, some; i < met.count; i += some) {
                const int64_t g = met.inputs[i] / w.group, last = (g + 1) * w.group;
                for (some = 1; some < 4 && i + some < met.count && met.inputs[i + some] < last;) ++some;
                add_expanded<BITS, ROWS>(w, met, i, some, g, in.begin, in.end, sums);
            }
        }
    });
}

template <int BITS>
void linear_columns_expand(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const int64_t stride = stripes(w) * BITS / 8;
    std::byte* slab = reinterpret_cast<std::byte*>(scratch);
    in_slabs(w, STRIPE, slab, slab + APART<float> * sizeof(float) * STRIPE / PANEL, batch, begin * STRIPE, end * STRIPE,
             [&](int64_t k) { return std::min({DEEP_FLOATS<float>, w.in - k, (k / w.group + 1) * w.group - k}); },
             [&](const Slab& s, int64_t from, int64_t until, std::byte* at) {
                 const uint8_t* codes = reinterpret_cast<const uint8_t*>(w.values) + s.k * stride;
                 for (int64_t v = 0; v < s.panels * PANEL; v += Vec::N) {
                     const int64_t output = s.o + v, line = BITS == 8 ? output : output / STRIPE * HALF + output % HALF, side = s.k / w.group * stripes(w) + output;
                     const int shift = BITS == 8 ? 0 : int(output % STRIPE / HALF * 4);
                     const Vec zero = zero_at<BITS>(w, side), scale = scale_at(w, side);
                     float* to = reinterpret_cast<float*>(at) + v / PANEL * APART<float> + v % PANEL;
                     for (int64_t i = from; i < until; ++i) {
                         __builtin_prefetch(codes + (i + AT_ONCE) * stride + line, 0, 2);
                         const Vec code = ((Ints::bytes(codes + i * stride + line) >> shift) & (BITS == 8 ? 255 : 15)).floats();
                         ((code - zero) * scale).store(to + i * PANEL);
                     }
                 }
             },
             times_slab<float>(w, static_cast<const float*>(ready), w.in, y));
}

}  // namespace trimtab::ISA
