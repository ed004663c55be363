// As many 32-bit integers as a Vec has floats; codes of 8, 4 or 2 bits lie in them four inputs side by side.
#pragma once
#include "vec.h"

namespace trimtab::ISA {

// A word holds 32 / BITS inputs of one output: byte b of field f is input 4 f + b.
template <int BITS>
constexpr int shift_of(int input) { return 8 * (input % 4) + BITS * (input / 4); }

#if defined(__AVX512F__)
struct Ints {
    __m512i v;
    static Ints zero() { return {_mm512_setzero_si512()}; }
    static Ints all(int x) { return {_mm512_set1_epi32(x)}; }
    static Ints load(const void* p) { return {_mm512_loadu_si512(p)}; }
    static Ints bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
    Vec floats() const { return {_mm512_cvtepi32_ps(v)}; }
    Ints operator>>(int n) const { return {_mm512_srli_epi32(v, unsigned(n))}; }
    Ints operator&(int m) const { return {_mm512_and_si512(v, _mm512_set1_epi32(m))}; }
    Ints operator<<(int n) const { return {_mm512_slli_epi32(v, unsigned(n))}; }
    Ints operator|(int m) const { return {_mm512_or_si512(v, _mm512_set1_epi32(m))}; }
    Ints operator|(Ints o) const { return {_mm512_or_si512(v, o.v)}; }
    Ints less(Ints o) const { return {_mm512_sub_epi8(v, o.v)}; }  // byte by byte
    // Numbers below 256, in every byte.
    Ints four() const { return {_mm512_mullo_epi32(v, _mm512_set1_epi32(0x01010101))}; }
    // Eight bytes everywhere, and of them those that the bytes of `which` (below 8) say.
    static Ints pick(const int8_t* eight, Ints which) { return {_mm512_shuffle_epi8(_mm512_set1_epi64(peek<long long>(eight)), which.v)}; }
    // Of M floats, four or eight, the one that the lowest two or three bits of each lane say; of eight the next bit is zero.
    template <int M>
    Vec of(const float* group) const {
        if constexpr (M == 4) return {_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(group)), v)};
        else return {_mm512_permutexvar_ps(v, _mm512_broadcast_f32x8(_mm256_loadu_ps(group)))};
    }
    // Adds the products of four unsigned bytes with four signed ones, in every lane. BITS below 8: two products fit into 16 bits.
    template <int BITS>
    Ints dot(Ints codes, Ints x) const {
#if defined(__AVX512VNNI__)
        __m512i r = v;  // the intrinsic is copied in and out by some compilers, at half the speed
        asm("vpdpbusd %2, %1, %0" : "+v"(r) : "v"(codes.v), "v"(x.v));
        return {r};
#else
        if constexpr (BITS < 8) {
            return {_mm512_add_epi32(v, _mm512_madd_epi16(_mm512_maddubs_epi16(codes.v, x.v), _mm512_set1_epi16(1)))};
        } else {  // pairs would overflow 16 bits: even and odd bytes one after the other
            const __m512i low = _mm512_set1_epi16(255);
            const __m512i even = _mm512_madd_epi16(_mm512_and_si512(codes.v, low), _mm512_srai_epi16(_mm512_slli_epi16(x.v, 8), 8));
            const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(codes.v, 8), _mm512_srai_epi16(x.v, 8));
            return {_mm512_add_epi32(v, _mm512_add_epi32(even, odd))};
        }
#endif
    }
};
#elif defined(__AVX2__)
struct Ints {
    __m256i v;
    static Ints zero() { return {_mm256_setzero_si256()}; }
    static Ints all(int x) { return {_mm256_set1_epi32(x)}; }
    static Ints load(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
    static Ints bytes(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))}; }
    Vec floats() const { return {_mm256_cvtepi32_ps(v)}; }
    Ints operator>>(int n) const { return {_mm256_srli_epi32(v, n)}; }
    Ints operator&(int m) const { return {_mm256_and_si256(v, _mm256_set1_epi32(m))}; }
    Ints operator<<(int n) const { return {_mm256_slli_epi32(v, n)}; }
    Ints operator|(int m) const { return {_mm256_or_si256(v, _mm256_set1_epi32(m))}; }
    Ints operator|(Ints o) const { return {_mm256_or_si256(v, o.v)}; }
    Ints less(Ints o) const { return {_mm256_sub_epi8(v, o.v)}; }
    Ints four() const { return {_mm256_mullo_epi32(v, _mm256_set1_epi32(0x01010101))}; }
    static Ints pick(const int8_t* eight, Ints which) { return {_mm256_shuffle_epi8(_mm256_set1_epi64x(peek<long long>(eight)), which.v)}; }
    template <int M>
    Vec of(const float* group) const {
        if constexpr (M == 4) return {_mm256_permutevar_ps(_mm256_broadcast_ps((const __m128*)group), v)};
        else return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(group), v)};
    }
    template <int BITS>
    Ints dot(Ints codes, Ints x) const {
        if constexpr (BITS < 8) {
            return {_mm256_add_epi32(v, _mm256_madd_epi16(_mm256_maddubs_epi16(codes.v, x.v), _mm256_set1_epi16(1)))};
        } else {
            const __m256i low = _mm256_set1_epi16(255);
            const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes.v, low), _mm256_srai_epi16(_mm256_slli_epi16(x.v, 8), 8));
            const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes.v, 8), _mm256_srai_epi16(x.v, 8));
            return {_mm256_add_epi32(v, _mm256_add_epi32(even, odd))};
        }
    }
};
#else
struct Ints {
    static constexpr int N = Vec::N;
    uint32_t v[N];
    template <class F>
    static Ints each(const F& f) { Ints r; for (int i = 0; i < N; ++i) r.v[i] = uint32_t(f(i)); return r; }
    static Ints zero() { return all(0); }
    static Ints all(int x) { return each([&](int) { return x; }); }
    static Ints load(const void* p) { Ints r; std::memcpy(r.v, p, sizeof r.v); return r; }
    static Ints bytes(const uint8_t* p) { return each([&](int i) { return p[i]; }); }
    Vec floats() const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = float(int32_t(v[i])); return r; }
    Ints operator>>(int n) const { return each([&](int i) { return v[i] >> n; }); }
    Ints operator&(int m) const { return each([&](int i) { return v[i] & uint32_t(m); }); }
    Ints operator<<(int n) const { return each([&](int i) { return v[i] << n; }); }
    Ints operator|(int m) const { return each([&](int i) { return v[i] | uint32_t(m); }); }
    Ints operator|(Ints o) const { return each([&](int i) { return v[i] | o.v[i]; }); }
    Ints less(Ints o) const {
        return each([&](int i) {
            uint32_t r = 0;
            for (int b = 0; b < 32; b += 8) r |= (((v[i] >> b) - (o.v[i] >> b)) & 255) << b;
            return r;
        });
    }
    Ints four() const { return each([&](int i) { return v[i] * 0x01010101; }); }
    static Ints pick(const int8_t* eight, Ints which) {
        return each([&](int i) {
            uint32_t r = 0;
            for (int b = 0; b < 4; ++b) r |= uint32_t(uint8_t(eight[which.v[i] >> 8 * b & 7])) << 8 * b;
            return r;
        });
    }
    template <int M>
    Vec of(const float* group) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = group[v[i] % M]; return r; }
    template <int BITS>
    Ints dot(Ints codes, Ints x) const {
        return each([&](int i) {
            int32_t sum = int32_t(v[i]);
            for (int b = 0; b < 4; ++b) sum += int32_t(codes.v[i] >> 8 * b & 255) * int8_t(x.v[i] >> 8 * b);
            return sum;
        });
    }
};
#endif

// The code of one input, as a float.
template <int BITS>
inline Vec code_of(Ints word, int input) {
#if defined(__AVX512F__)
    if constexpr (BITS <= 4) {  // a table answers for four bits, whatever stands above them
        alignas(64) static constexpr float FOUR[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        alignas(64) static constexpr float TWO[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        return {_mm512_permutexvar_ps((word >> shift_of<BITS>(input)).v, _mm512_load_ps(BITS == 4 ? FOUR : TWO))};
    }
#endif
    return ((word >> shift_of<BITS>(input)) & ((1 << BITS) - 1)).floats();
}

// Field f of a word of codes: four inputs, a byte each.
template <int BITS>
inline Ints field(Ints word, int f) {
    constexpr int ones = int(0x01010101u * ((1u << BITS) - 1));
    if constexpr (BITS == 8) return word;
    else return (word >> BITS * f) & ones;
}

}  // namespace trimtab::ISA
