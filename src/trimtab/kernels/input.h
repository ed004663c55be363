// x made ready once for all panels: rounded to bfloat16, or to eight bits with a scale a group.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernel.h"
#include "vec.h"
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace trimtab::ISA {

// Inputs that share a scale of x where the weights' groups do not say.
constexpr int64_t GROUP = 256;

// x in eight bits: codes [batch, stride] in tiles, zeros behind the last input; a scale and the sum of codes, [batch, groups] each,
// or where tiles are full [groups, rows] of each tile.
struct Codes {
    int64_t stride, groups;
    int8_t* x;
    float* scales;
    float* sums;
    Codes(const void* at, const Input& input, int64_t in, int64_t batch) : stride(input.units(in) * 4), groups((in + input.group - 1) / input.group) {
        x = static_cast<int8_t*>(const_cast<void*>(at));
        scales = reinterpret_cast<float*>(x + batch * stride);
        sums = scales + batch * groups;
    }
};

// The tile of a row: where it begins and how many rows it has; as `tiles` goes through them, or full ones and single rows.
struct TileAt { int64_t first; int rows; };
inline TileAt tile_at(int64_t row, int64_t batch, int most, bool full = false) {
    int64_t first = 0;
    for (int rows : {most, 4, 2, 1}) {
        if (rows > most || (full && rows < most && rows > 1)) continue;
        const int64_t until = first + (batch - first) / rows * rows;
        if (row < until) return {first + (row - first) / rows * rows, rows};
        first = until;
    }
    return {row, 1};
}

// `units` units of four bytes of a row go to their places in its tile.
inline void place(const void* row, int64_t units, TileAt tile, int64_t r, int64_t width, void* to) {
    std::byte* at = static_cast<std::byte*>(to) + (tile.first * width + r - tile.first) * 4;
    const std::byte* from = static_cast<const std::byte*>(row);
    for (int64_t u = 0; u < units; ++u) std::memcpy(at + u * tile.rows * 4, from + u * 4, 4);
}

// Rows of x that a kernel of lanes takes together: the more, the fewer times its weights are gone through, and 128 inputs of them
// are what the first-level cache holds. Of the last of them those that fill vectors, and then one after the other.
constexpr int64_t LANES = 4 * Vec::N;
inline TileAt lanes_at(int64_t row, int64_t batch) {
    const int64_t first = row / LANES * LANES, beside = in_vectors(batch, Vec::N);
    return row < beside ? TileAt{first, int(std::min(LANES, beside - first))} : TileAt{row, 1};
}

// Rows become columns: unit u of row r goes to to[u * width + r]. Four units of ROWS rows, at most four.
template <int ROWS>
inline void turn(const uint32_t* from, int64_t stride, uint32_t* to, int64_t width) {
#if defined(__SSE2__)
    __m128i row[4];
    for (int r = 0; r < 4; ++r) row[r] = _mm_loadu_si128((const __m128i*)(from + std::min(r, ROWS - 1) * stride));
    const __m128i low[2] = {_mm_unpacklo_epi32(row[0], row[1]), _mm_unpacklo_epi32(row[2], row[3])};
    const __m128i high[2] = {_mm_unpackhi_epi32(row[0], row[1]), _mm_unpackhi_epi32(row[2], row[3])};
    const __m128i unit[4] = {_mm_unpacklo_epi64(low[0], low[1]), _mm_unpackhi_epi64(low[0], low[1]),
                             _mm_unpacklo_epi64(high[0], high[1]), _mm_unpackhi_epi64(high[0], high[1])};
    for (int u = 0; u < 4; ++u) {
        // In a tile of three, what is one too many lies where the next unit goes.
        if (ROWS == 4 || (ROWS == 3 && width == 3 && u < 3)) _mm_storeu_si128((__m128i*)(to + u * width), unit[u]);
        else std::memcpy(to + u * width, &unit[u], ROWS * 4);
    }
#else
    for (int u = 0; u < 4; ++u)
        for (int r = 0; r < ROWS; ++r) std::memcpy(to + u * width + r, from + r * stride + u, 4);
#endif
}

constexpr int64_t READ = 256;  // units of a row that are read in one go

// All of `units` units of four bytes of `rows` rows, which become columns among `width`.
inline void turn_rows(const uint32_t* from, int64_t stride, int64_t rows, int64_t units, uint32_t* to, int64_t width) {
    if (width == 1) {
        std::memcpy(to, from, size_t(units) * 4);
        return;
    }
    for (int64_t begin = 0; begin < units; begin += READ) {
        const int64_t end = std::min(units, begin + READ), whole = begin + (end - begin) / 4 * 4;
        for (int64_t r = 0; r < rows; r += 4) {
            const auto run = [&]<int ROWS>() {
                for (int64_t u = begin; u < whole; u += 4) turn<ROWS>(from + r * stride + u, stride, to + u * width + r, width);
            };
            switch (rows - r) {
                case 1: run.template operator()<1>(); break;
                case 2: run.template operator()<2>(); break;
                case 3: run.template operator()<3>(); break;
                default: run.template operator()<4>();
            }
        }
        for (int64_t u = whole; u < end; ++u)
            for (int64_t r = 0; r < rows; ++r) std::memcpy(to + u * width + r, from + r * stride + u, 4);
    }
}

inline void to_bf16(const float* x, int64_t in, uint16_t* to) {
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 16 <= in; i += 16) _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
    if (const int left = int(in - i)) {
        const __mmask16 some = __mmask16((1u << left) - 1);
        _mm256_mask_storeu_epi16(to + i, __mmask16((1u << (left + left % 2)) - 1), (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + i)));
    }
#else
    for (; i < in; ++i) {
        const uint32_t bits = peek<uint32_t>(x + i);
        to[i] = (bits & 0x7fffffff) > 0x7f800000 ? uint16_t(bits >> 16 | 64) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    if (in % 2) to[in] = 0;
#endif
}

// The largest magnitude, as bits: what is not finite is above all that is.
inline uint32_t largest(const float* x, int64_t begin, int64_t end) {
    uint32_t most = 0;
    for (int64_t i = begin; i < end; ++i) most = std::max(most, peek<uint32_t>(x + i) & 0x7fffffff);
    return most;
}

// code = x / scale to the nearest, scale = max |x| / 127 of the group, or of the row or one given, as `input` says. A group that holds
// what is not finite gets a scale of NaN. Scales and sums of the row's groups lie `apart`.
inline void to_codes(const Input& input, const float* x, int64_t in, int8_t* codes, int64_t stride, float* scales, float* sums, int64_t apart) {
    const float levels = input.bits ? float((1 << (input.bits - 1)) - 1) : 127.0f;
    const uint32_t row = input.bits && input.scale == 0 ? largest(x, 0, in) : 0;
    for (int64_t begin = 0; begin < in; begin += input.group) {
        const int64_t end = std::min(in, begin + input.group);
        const uint32_t most = row ? row : largest(x, begin, end);
        const bool finite = most < 0x7f800000;
        const float top = input.scale > 0 ? input.scale * levels : std::bit_cast<float>(most);
        const float inverse = finite && top > 1e-30f ? levels / top : 0.0f;
        int32_t sum = 0;
        for (int64_t i = begin; i < end; ++i) {
            const float within = std::min(std::max((finite ? x[i] : 0.0f) * inverse, -levels), levels);
            const float shifted = within + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to an integer
            const int32_t code = std::bit_cast<int32_t>(shifted) - 0x4b400000;
            codes[i] = int8_t(code);
            sum += code;
        }
        *scales = finite ? (inverse > 0 ? top / levels : 0.0f) : std::nanf("");
        *sums = float(sum);
        scales += apart;
        sums += apart;
    }
    std::fill(codes + in, codes + stride, int8_t(0));
}

inline void prepare(const Input& input, const float* x, int64_t in, int64_t batch, int64_t begin, int64_t end, std::byte* to) {
    const int64_t units = input.units(in), stride = units + 16;  // of lines: whole pages apart, rows would share cache sets
    thread_local std::vector<uint32_t> lines;
    for (int64_t r = begin; r < end;) {
        TileAt tile{r, 1};
        if (input.tile) tile = tile_at(r, batch, input.tile, input.full);
        if (input.lanes) tile = lanes_at(r, batch);
        const int64_t some = std::min<int64_t>(end, tile.first + tile.rows) - r;
        uint32_t* at = reinterpret_cast<uint32_t*>(to) + tile.first * units + (r - tile.first);
        const uint32_t* from = reinterpret_cast<const uint32_t*>(x + r * in);
        if (input.type != Type::f32) {
            lines.resize(size_t(some * stride));
            from = lines.data();
        }
        for (int64_t k = 0; k < some; ++k) {
            void* line = tile.rows == 1 ? at : lines.data() + k * stride;
            if (input.type == Type::bf16) {
                to_bf16(x + (r + k) * in, in, static_cast<uint16_t*>(line));
            } else if (input.type == Type::i8) {
                const Codes c(to, input, in, batch);
                const int64_t apart = input.full ? tile.rows : 1, side = input.full ? tile.first * c.groups + r + k - tile.first : (r + k) * c.groups;
                to_codes(input, x + (r + k) * in, in, static_cast<int8_t*>(line), c.stride, c.scales + side, c.sums + side, apart);
            }
        }
        if (input.type == Type::f32 || tile.rows > 1) turn_rows(from, input.type == Type::f32 ? in : stride, some, units, at, tile.rows);
        r += some;
    }
}

}  // namespace trimtab::ISA
