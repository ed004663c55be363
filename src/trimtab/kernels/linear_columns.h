// Input after input, the weights of all outputs one after the other: what no row of x meets with anything but zero is not read.
//
// A few rows of x go over the columns they meet, four side by side, and ask for the next four meanwhile: no hardware foresees which ones
// these are, and waiting for them would keep what is to be multiplied from being so. Threads divide the inputs, for the longer a column is
// read the better, and what they add up to lies in the first-level cache. Many rows meet nearly all: then a panel of 32 outputs becomes
// what a dense one is.
#pragma once
#include "linear_expand.h"
#include "linear_row.h"

namespace trimtab::ISA {

constexpr int64_t BLOCK = 128;  // inputs of a panel that is made dense
constexpr int HALF = 64;        // of codes of four bits: output o and o + 64 share a byte
constexpr int64_t TALL = 4096;  // outputs whose sums stay in the first-level cache

inline int64_t stripes(const Weights& w) { return w.panels() * STRIPE; }

// A thread's part of something that is counted.
struct Share {
    int part, parts;
    int64_t begin(int64_t count) const { return count * part / parts; }
    int64_t end(int64_t count) const { return count * (part + 1) / parts; }
};

// Sums of some rows, [ROWS, outputs filled up].
template <class T, int ROWS>
struct Sums {
    T* at;
    int64_t stride;
    T* operator()(int r, int64_t o) const { return at + r * stride + o; }
    void clear() const { std::fill_n(at, ROWS * stride, T(0)); }
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

// f(i) for those of `count` entries of one row of x from the first on that are met.
template <class X, class F>
inline void each_met(const X* x, int64_t count, const F& f) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (uint32_t bits = met_of(x + i); bits; bits &= bits - 1) f(i + std::countr_zero(bits));
    for (; i < count; ++i)
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
inline void meet(const float* x, int64_t in, Met& met) {
    int64_t n = 0;
    if constexpr (ROWS == 1) {
        each_met(x, in, [&](int64_t i) { met.x[n] = x[i], met.inputs[n++] = int32_t(i); });
        met.count = n;
        return;
    }
    for (int64_t i = 0; i < in; ++i, x += ROWS) {
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

inline int64_t columns_scratch(const Weights& w, int64_t batch) {
    if (batch > FEW) return BLOCK * PANEL + total_scratch<PANEL>(w, batch);
    return FEW * (stripes(w) + w.in) + (w.in + w.in / 8 + 64) * (1 + FEW) + 64;
}

// Outputs begin .. end of TOGETHER columns from the first one on.
template <class T, int ROWS, int TOGETHER>
inline void add_some(const Weights& w, const Met& met, int64_t first, int64_t begin, int64_t end, const Sums<float, ROWS>& sums) {
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

// Of `ROWS` rows of x (1, 2 or 4), what a share of the inputs they meet adds up to: `to` [ROWS, outputs filled up].
template <class T, int ROWS>
inline void few_rows(const Weights& w, const float* x, Share share, float* to, float* scratch) {
    const Sums<float, ROWS> sums{to, stripes(w)};
    Met met{reinterpret_cast<int32_t*>(scratch), scratch + w.in + 1};
    meet<ROWS>(x, w.in, met);
    sums.clear();
    for (int64_t o = 0; o < stripes(w); o += TALL) {
        const int64_t until = std::min(o + TALL, stripes(w)), end = share.end(met.count);
        int64_t i = share.begin(met.count);
        for (; i + 4 <= end; i += 4) add_some<T, ROWS, 4>(w, met, i, o, until, sums);
        for (; i < end; ++i) add_some<T, ROWS, 1>(w, met, i, o, until, sums);
    }
}

template <class T>
void columns_part(const Weights& w, const void* ready, int64_t batch, int part, int parts, float* sums, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        if constexpr (ROWS <= FEW) few_rows<T, ROWS>(w, x + row * w.in, {part, parts}, sums + row * stripes(w), scratch);
    });
}

// Inputs k .. k + some of 32 outputs as a dense panel has them.
inline void dense_panel(const float* from, int64_t stride, int64_t some, float* to) {
    for (int64_t i = 0; i < some; ++i) std::copy_n(from + i * stride, PANEL, to + i * PANEL);
}
inline void dense_panel(const uint16_t* from, int64_t stride, int64_t some, uint16_t* to) {
    for (int64_t i = 0; i < some; i += 2) {
        const uint16_t *a = from + i * stride, *b = a + (i + 1 < some ? stride : 0);
        const bool both = i + 1 < some;
        for (int o = 0; o < PANEL; ++o) to[i * PANEL + 2 * o] = a[o], to[i * PANEL + 2 * o + 1] = both ? b[o] : uint16_t(0);
    }
}

template <class T, class X>
inline void many_rows(const Weights& w, const X* x, int64_t width, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    T* panel = reinterpret_cast<T*>(scratch);
    const int64_t stride = stripes(w);
    for (int64_t o = begin; o < std::min(end, w.out); o += PANEL)
        for (int64_t k = 0; k < w.in; k += BLOCK) {
            const int64_t some = std::min(BLOCK, w.in - k);
            dense_panel(reinterpret_cast<const T*>(w.values) + k * stride + o, stride, some, panel);
            add_panel(w, panel, x, width, k, some, batch, y, o / PANEL);
        }
}

#if defined(__AVX512BF16__)
inline Input columns_bf16(const Weights&) { return {Type::bf16, 0, tile_rows<PANEL>()}; }

// x was rounded to bfloat16: for a few rows, which wait for memory, it becomes floats again.
inline void columns_part_bf16(const Weights& w, const void* ready, int64_t batch, int part, int parts, float* sums, float* scratch) {
    const uint16_t* x = static_cast<const uint16_t*>(ready);
    float *as_floats = scratch, *rest = scratch + FEW * w.in;
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        if constexpr (ROWS <= FEW) {
            const uint16_t* from = x + row * (w.in + w.in % 2);
            for (int64_t i = 0; i < w.in; ++i)
                for (int r = 0; r < ROWS; ++r) as_floats[i * ROWS + r] = std::bit_cast<float>(uint32_t(from[(i / 2 * ROWS + r) * 2 + i % 2]) << 16);
            few_rows<uint16_t, ROWS>(w, as_floats, {part, parts}, sums + row * stripes(w), rest);
        }
    });
}

inline void linear_columns_bf16(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    many_rows<uint16_t>(w, static_cast<const uint16_t*>(x), w.in + w.in % 2, batch, y, begin * STRIPE, end * STRIPE, scratch);
}
#endif

template <class T>
void linear_columns(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    many_rows<T>(w, static_cast<const float*>(x), w.in, batch, y, begin * STRIPE, end * STRIPE, scratch);
}

// ---- codes ------------------------------------------------------------------------------------
// Inputs in fours, each four of one group of x: what x is there, [quads, ROWS] words; the last four of a group are filled up with zeros of
// x. `until` says where each group ends.
struct Quads {
    int32_t* inputs;
    int32_t* x;
    int64_t count = 0;
};

// A line of codes of one column, its outputs a byte each.
template <int BITS>
struct Line {
    static constexpr int PARTS = BITS == 4 ? 2 : 1;
    Ints part[PARTS];
    explicit Line(const std::byte* at) {
        const Ints its = Ints::load(at);
        if constexpr (BITS == 4) part[0] = its & 0x0f0f0f0f, part[1] = its >> 4 & 0x0f0f0f0f;
        else part[0] = its;
    }
};

// Outputs begin .. end of four columns times x. They lie in the sums in the order that `straight` undoes.
template <int BITS, int ROWS>
inline void add_quad(const Weights& w, const Quads& quads, int64_t q, int64_t begin, int64_t end, const Sums<int32_t, ROWS>& sums) {
    using L = Line<BITS>;
    const int64_t stride = stripes(w) * BITS / 8;
    const std::byte* at[4];
    for (int c = 0; c < 4; ++c) at[c] = w.values + quads.inputs[4 * q + c] * stride;
    const std::byte* next[4];
    for (int c = 0; c < 4; ++c) next[c] = w.values + quads.inputs[4 * std::min(q + 1, quads.count - 1) + c] * stride;
    Ints x[ROWS];
    unrolled<ROWS>(EACH(r) { x[r] = Ints::all(quads.x[q * ROWS + r]); });
    for (int64_t o = begin * BITS / 8; o < end * BITS / 8; o += 4 * Vec::N) {
        for (int c = 0; c < 4; ++c) __builtin_prefetch(next[c] + o);
        const L lines[4] = {L(at[0] + o), L(at[1] + o), L(at[2] + o), L(at[3] + o)};
        // Of codes of four bits a line is two halves of a stripe.
        const int64_t to = BITS == 8 ? o : o / HALF * STRIPE + o % HALF;
        unrolled<L::PARTS>(EACH(p) {
            Ints four[4] = {lines[0].part[p], lines[1].part[p], lines[2].part[p], lines[3].part[p]};
            Ints::beside(four);
            unrolled<ROWS>(EACH(r) {
                unrolled<4>(EACH(k) {
                    int32_t* sum = sums(r, to + p * HALF + k * Vec::N);
                    Ints::load(sum).template dot<BITS>(four[k], x[r]).store(sum);
                });
            });
        });
    }
}

// What the codes of a group added up to goes, with their scales and less the zero points, to the sums; `met` is what x sums up to.
template <int BITS, int ROWS>
inline void settle(const Weights& w, int64_t side, int64_t begin, int64_t end, const Sums<int32_t, ROWS>& codes, const float* met, const float* step,
                   const Sums<float, ROWS>& sums) {
    for (int64_t o = begin; o < end; o += 4 * Vec::N)
        unrolled<ROWS>(EACH(r) {
            Ints four[4];
            unrolled<4>(EACH(k) {
                four[k] = Ints::load(codes(r, o + k * Vec::N));
                Ints::zero().store(codes(r, o + k * Vec::N));
            });
            Ints::straight(four);
            unrolled<4>(EACH(k) {
                const int64_t at = side + o + k * Vec::N;
                const Vec whole = four[k].floats() - zero_at<BITS>(w, at) * Vec::all(met[r]);
                float* to = sums(r, o + k * Vec::N);
                Vec::load(to).fma(whole, scale_at(w, at) * Vec::all(step[r])).store(to);
            });
        });
}

template <int BITS, int ROWS>
inline void few_rows_codes(const Weights& w, const Codes& x, int64_t group, int64_t row, Share share, float* to, float* scratch) {
    const Sums<float, ROWS> sums{to, stripes(w)};
    const Sums<int32_t, ROWS> ints{reinterpret_cast<int32_t*>(scratch), stripes(w)};
    scratch += ROWS * stripes(w);
    Quads quads{reinterpret_cast<int32_t*>(scratch), reinterpret_cast<int32_t*>(scratch + w.in + w.in / 8 + 64)};
    thread_local std::vector<int64_t> until;
    until.clear();
    const int8_t* codes = x.x + row * x.stride;
    int8_t* its = reinterpret_cast<int8_t*>(quads.x);
    int64_t n = 0;
    for (int64_t g = 0; g < x.groups; ++g) {
        if constexpr (ROWS == 1)
            each_met(codes + g * group, std::min(w.in - g * group, group), [&](int64_t i) {
                its[n] = codes[g * group + i], quads.inputs[n++] = int32_t(g * group + i);
            });
        else for (int64_t i = g * group, last = std::min(w.in, i + group); i < last; ++i) {
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
    sums.clear();
    ints.clear();
    for (int64_t o = 0; o < stripes(w); o += TALL) {
        const int64_t below = std::min(o + TALL, stripes(w)), end = share.end(quads.count);
        int64_t q = share.begin(quads.count);
        for (int64_t g = 0; g < x.groups; ++g) {
            const float* scale = x.scales + row * x.groups + g;  // of row r `x.groups` further on
            float step[ROWS], met[ROWS] = {};
            for (int r = 0; r < ROWS; ++r) {
                step[r] = scale[r * x.groups];
                if (step[r] != step[r]) std::fill(sums(r, o), sums(r, below), step[r]);  // what is no number has no codes, and is not lost
            }
            const int64_t last = std::min(end, until[size_t(g)]);
            if (q >= last) continue;
            for (; q < last; ++q) {
                for (int r = 0; r < ROWS; ++r)
                    for (int b = 0; b < 4; ++b) met[r] += its[(q * ROWS + r) * 4 + b];
                add_quad<BITS, ROWS>(w, quads, q, o, below, ints);
            }
            settle<BITS, ROWS>(w, (w.groups() > 1 ? g : 0) * stripes(w), o, below, ints, met, step, sums);
        }
    }
}

inline Input columns_codes(const Weights& w) { return {Type::i8, group_of(w), tile_rows<PANEL>()}; }

template <int BITS>
void columns_codes_part(const Weights& w, const void* ready, int64_t batch, int part, int parts, float* sums, float* scratch) {
    const Input input = columns_codes(w);
    const Codes x(ready, input, w.in, batch);
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        if constexpr (ROWS <= FEW) few_rows_codes<BITS, ROWS>(w, x, input.group, row, {part, parts}, sums + row * stripes(w), scratch);
    });
}

// Inputs k .. k + some of 32 outputs in words, as a dense panel has them.
template <int BITS>
inline void words_of_panel(const Weights& w, int64_t k, int64_t some, int64_t o, uint8_t* to) {
    constexpr int P = 32 / BITS;
    const int64_t stride = stripes(w) * BITS / 8;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(w.values) + (BITS == 8 ? o : o / STRIPE * HALF + o % HALF);
    const int shift = BITS == 8 ? 0 : int(o % STRIPE / HALF * 4);
    for (int64_t i = 0; i < some; i += P, to += 4 * PANEL) {
        std::fill_n(to, 4 * PANEL, uint8_t(0));
        for (int j = 0; j < P && i + j < some; ++j) {
            const uint8_t* column = from + (k + i + j) * stride;
            for (int p = 0; p < PANEL; ++p) to[4 * p + j % 4] = uint8_t(to[4 * p + j % 4] | (BITS == 8 ? column[p] : (column[p] >> shift & 15) << j / 4 * 4));
        }
    }
}

template <int BITS>
void linear_columns_codes(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const Input input = columns_codes(w);
    const Codes x(ready, input, w.in, batch);
    begin *= STRIPE, end *= STRIPE;
    constexpr int P = 32 / BITS;
    thread_local std::vector<uint8_t> held;
    held.resize(std::max(held.size(), size_t((w.in + P - 1) / P * 4 * PANEL)));
    for (int64_t o = begin; o < std::min(end, w.out); o += PANEL) {
        words_of_panel<BITS>(w, 0, w.in, o, held.data());
        tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
            open_total<PANEL, ROWS>(scratch);
            for (int64_t g = 0; g < x.groups; ++g) {
                const int64_t from = g * input.group, until = std::min(w.in, from + input.group);
                add_codes<BITS, PANEL, ROWS>(scratch, w, reinterpret_cast<const std::byte*>(held.data()) + from / P * 4 * PANEL,
                                             (until - from + P - 1) / P, x, row, from, g, (w.groups() > 1 ? g : 0) * stripes(w) + o);
            }
            close_total<PANEL, ROWS>(scratch, w, y + row * w.out, o);
        });
    }
}

// ---- codes, x as it is ------------------------------------------------------------------------
// Some columns of group g, as floats; their scale comes last.
template <int BITS, int ROWS>
inline void add_expanded(const Weights& w, const Met& met, int64_t first, int64_t count, int64_t g, const Sums<float, ROWS>& sums) {
    const int64_t stride = stripes(w) * BITS / 8, side = g * stripes(w);
    float all[ROWS] = {};
    for (int64_t i = first; i < first + count; ++i)
        for (int r = 0; r < ROWS; ++r) all[r] += met.x[i * ROWS + r];
    for (int64_t o = 0; o < stripes(w); o += Vec::N) {
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
void columns_expand_part(const Weights& w, const void* ready, int64_t batch, int part, int parts, float* to, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    tiles<PANEL>(batch, [&]<int ROWS>(int64_t row) {
        if constexpr (ROWS <= FEW) {
            const Sums<float, ROWS> sums{to + row * stripes(w), stripes(w)};
            Met met{reinterpret_cast<int32_t*>(scratch), scratch + w.in + 1};
            meet<ROWS>(x + row * w.in, w.in, met);
            sums.clear();
            const Share share{part, parts};
            for (int64_t i = share.begin(met.count), end = share.end(met.count), some; i < end; i += some) {
                const int64_t g = met.inputs[i] / w.group, last = (g + 1) * w.group;
                for (some = 1; some < 4 && i + some < end && met.inputs[i + some] < last;) ++some;
                add_expanded<BITS, ROWS>(w, met, i, some, g, sums);
            }
        }
    });
}

template <int BITS>
void linear_columns_expand(const Weights& w, const void* ready, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch) {
    const float* x = static_cast<const float*>(ready);
    begin *= STRIPE, end *= STRIPE;
    const int64_t stride = stripes(w) * BITS / 8;
    for (int64_t o = begin; o < std::min(end, w.out); o += PANEL)
        for (int64_t k = 0; k < w.in;) {
            const int64_t g = k / w.group, some = std::min({BLOCK, w.in - k, (g + 1) * w.group - k});
            const int64_t line = BITS == 8 ? o : o / STRIPE * HALF + o % HALF, side = g * stripes(w) + o;
            const int shift = BITS == 8 ? 0 : int(o % STRIPE / HALF * 4);
            for (int64_t i = 0; i < some; ++i) {
                const uint8_t* at = reinterpret_cast<const uint8_t*>(w.values) + (k + i) * stride + line;
                for (int v = 0; v < PANEL; v += Vec::N) {
                    const Vec code = ((Ints::bytes(at + v) >> shift) & (BITS == 8 ? 255 : 15)).floats();
                    ((code - zero_at<BITS>(w, side + v)) * scale_at(w, side + v)).store(scratch + i * PANEL + v);
                }
            }
            add_panel(w, scratch, x, w.in, k, some, batch, y, o / PANEL);
            k += some;
        }
}

}  // namespace trimtab::ISA
