// A vector of floats as the flags of this translation unit allow: sixteen, eight or four at once.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif


namespace trimtab::ISA {  // a namespace for each set of flags: no inline function may be shared between them

template <class T>
inline T peek(const void* p) { T v; std::memcpy(&v, p, sizeof v); return v; }

#if defined(__AVX512F__)
struct Vec {
    static constexpr int N = 16;
    __m512 v;
    static Vec zero() { return {_mm512_setzero_ps()}; }
    static Vec all(float x) { return {_mm512_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    Vec fma(Vec a, Vec b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }
    Vec operator+(Vec b) const { return {_mm512_add_ps(v, b.v)}; }
    Vec operator-(Vec b) const { return {_mm512_sub_ps(v, b.v)}; }
    Vec operator*(Vec b) const { return {_mm512_mul_ps(v, b.v)}; }
    Vec operator/(Vec b) const { return {_mm512_div_ps(v, b.v)}; }
    // The larger and the smaller of two; where this one is not a number, it.
    Vec max(Vec b) const { return {_mm512_max_ps(b.v, v)}; }
    Vec min(Vec b) const { return {_mm512_min_ps(b.v, v)}; }
    // 2^n, where this is n + 1.5 * 2^23 with a whole n from -126 to 127.
    Vec power() const { return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(v), 23), _mm512_set1_epi32(0x3f800000)))}; }
#if defined(__AVX512BF16__)
    // Adds the products of two bfloat16 a lane.
    Vec dot(Vec a, Vec b) const { return {_mm512_dpbf16_ps(v, (__m512bh)_mm512_castps_si512(a.v), (__m512bh)_mm512_castps_si512(b.v))}; }
#endif
    // bfloat16 is the upper half of a float.
    static Vec bf16(const uint16_t* p) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
    }
    static Vec f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
    // Of pairs that lie side by side: the first and the second of each.
    static Vec low(const uint16_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
    static Vec high(const uint16_t* p) {
        return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(int(0xffff0000))))};
    }
};
#elif defined(__AVX2__)
struct Vec {
    static constexpr int N = 8;
    __m256 v;
    static Vec zero() { return {_mm256_setzero_ps()}; }
    static Vec all(float x) { return {_mm256_set1_ps(x)}; }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    Vec fma(Vec a, Vec b) const { return {_mm256_fmadd_ps(a.v, b.v, v)}; }
    Vec operator+(Vec b) const { return {_mm256_add_ps(v, b.v)}; }
    Vec operator-(Vec b) const { return {_mm256_sub_ps(v, b.v)}; }
    Vec operator*(Vec b) const { return {_mm256_mul_ps(v, b.v)}; }
    Vec operator/(Vec b) const { return {_mm256_div_ps(v, b.v)}; }
    Vec max(Vec b) const { return {_mm256_max_ps(b.v, v)}; }
    Vec min(Vec b) const { return {_mm256_min_ps(b.v, v)}; }
    Vec power() const { return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(v), 23), _mm256_set1_epi32(0x3f800000)))}; }
    static Vec bf16(const uint16_t* p) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
    }
    static Vec f16(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
    static Vec low(const uint16_t* p) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16))};
    }
    static Vec high(const uint16_t* p) {
        return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(int(0xffff0000))))};
    }
};
#else
struct Vec {
    static constexpr int N = 4;
    float v[4];
    static Vec zero() { return {{0, 0, 0, 0}}; }
    static Vec all(float x) { return {{x, x, x, x}}; }
    static Vec load(const float* p) { Vec r; std::memcpy(r.v, p, sizeof r.v); return r; }
    void store(float* p) const { std::memcpy(p, v, sizeof v); }
    Vec fma(Vec a, Vec b) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = v[i] + a.v[i] * b.v[i]; return r; }
    Vec operator+(Vec b) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = v[i] + b.v[i]; return r; }
    Vec operator-(Vec b) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = v[i] - b.v[i]; return r; }
    Vec operator*(Vec b) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = v[i] * b.v[i]; return r; }
    Vec operator/(Vec b) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = v[i] / b.v[i]; return r; }
    Vec max(Vec b) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = b.v[i] > v[i] ? b.v[i] : v[i]; return r; }
    Vec min(Vec b) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = b.v[i] < v[i] ? b.v[i] : v[i]; return r; }
    Vec power() const {
        Vec r;
        for (int i = 0; i < N; ++i) r.v[i] = std::bit_cast<float>((std::bit_cast<uint32_t>(v[i]) << 23) + 0x3f800000u);
        return r;
    }
    static float wide(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }
    static Vec bf16(const uint16_t* p) { Vec r; for (int i = 0; i < N; ++i) r.v[i] = wide(peek<uint16_t>(p + i)); return r; }
    static float whole(uint16_t h) {  // of a half: 5 bits of exponent, 10 of fraction
        const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
        if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
        if (rest >= 0x400) return std::bit_cast<float>(sign | ((rest << 13) + (112u << 23)));
        const float tiny = float(rest) * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    static Vec f16(const uint16_t* p) { Vec r; for (int i = 0; i < N; ++i) r.v[i] = whole(peek<uint16_t>(p + i)); return r; }
    static Vec low(const uint16_t* p) { Vec r; for (int i = 0; i < N; ++i) r.v[i] = wide(peek<uint16_t>(p + 2 * i)); return r; }
    static Vec high(const uint16_t* p) { Vec r; for (int i = 0; i < N; ++i) r.v[i] = wide(peek<uint16_t>(p + 2 * i + 1)); return r; }
};
#endif

}  // namespace trimtab::ISA
