// As many 32-bit integers as a Vec has floats; codes lie in them four inputs side by side.
#pragma once
#include "kernel.h"
#include "tile.h"
#include "vec.h"

namespace trimtab::ISA {

// In place of a width of 8, 4, 3 or 2 bits: five ternary codes a byte; added to a width: codes of a table.
constexpr int TRITS = 0, LOOKUP = 16;

// A unit of codes of one output: words, and inputs they hold, in fields of four: byte b of field f is input 4 f + b.
template <int BITS>
constexpr int words_in() { return BITS % LOOKUP == 3 ? 3 : 1; }
template <int BITS>
constexpr int inputs_in() {
    if constexpr (BITS == TRITS) return 20;
    else if constexpr (BITS % LOOKUP == 3) return 32;
    else return 32 / (BITS % LOOKUP);
}
template <int BITS>
constexpr int shift_of(int input) { return 8 * (input % 4) + BITS * (input / 4); }

#if defined(__AVX2__) || defined(TRIMTAB_NEON)
// For every byte of a vector the byte of its lane's input `from`, of 32 / BITS inputs.
template <int BITS>
struct Taken {
    alignas(64) int8_t at[32 / BITS][64];
    constexpr Taken() : at{} {
        for (int from = 0; from < 32 / BITS; ++from)
            for (int i = 0; i < 64; ++i) at[from][i] = int8_t(i % 16 / 4 * 4 + from * BITS / 8 + i % (BITS / 8));
    }
};
template <int BITS>
constexpr Taken<BITS> TAKEN;
#endif

#if defined(__AVX512F__)
struct Ints {
    __m512i v;
    static Ints zero() { return {_mm512_setzero_si512()}; }
    static Ints all(int x) { return {_mm512_set1_epi32(x)}; }
    static Ints load(const void* p) { return {_mm512_loadu_si512(p)}; }
    void store(void* p) const { _mm512_storeu_si512(p, v); }
    // Eight words, or a vector of fewer; zeros in the other lanes.
    static constexpr int EIGHT = 8;
    static Ints eight(const void* p) { return {_mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)p))}; }
    static Ints bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
    Vec floats() const { return {_mm512_cvtepi32_ps(v)}; }
    Ints operator>>(int n) const { return {_mm512_srli_epi32(v, unsigned(n))}; }
    Ints operator&(int m) const { return {_mm512_and_si512(v, _mm512_set1_epi32(m))}; }
    Ints operator<<(int n) const { return {_mm512_slli_epi32(v, unsigned(n))}; }
    Ints operator|(int m) const { return {_mm512_or_si512(v, _mm512_set1_epi32(m))}; }
    Ints operator|(Ints o) const { return {_mm512_or_si512(v, o.v)}; }
    Ints less(Ints o) const { return {_mm512_sub_epi8(v, o.v)}; }  // byte by byte
    // Products of unsigned bytes with signed ones, two summed up in 16 bits; sums of those; and two of them in 32 bits.
    Ints pairs(Ints x) const { return {_mm512_maddubs_epi16(v, x.v)}; }
    Ints with_pairs(Ints o) const { return {_mm512_add_epi16(v, o.v)}; }
    Ints with_fours(Ints pairs) const { return {_mm512_add_epi32(v, _mm512_madd_epi16(pairs.v, _mm512_set1_epi16(1)))}; }
    // Numbers below 256, in every byte.
    Ints four() const { return {_mm512_mullo_epi32(v, _mm512_set1_epi32(0x01010101))}; }
    // Of every byte b: 3 b / 256, and what is left of 3 b.
    Ints trits() const {  // 3 / 4 of b, rounded so that the upper two bits are the answer for every b
        const __m512i most = _mm512_subs_epu8(_mm512_avg_epu8(v, _mm512_setzero_si512()), _mm512_set1_epi8(2));
        return Ints{_mm512_avg_epu8(v, most)} >> 6 & 0x03030303;
    }
    Ints thrice() const { return {_mm512_add_epi8(_mm512_add_epi8(v, v), v)}; }
    // Eight bytes everywhere, and of them those that the bytes of `which` (below 8) say.
    static Ints pick(const int8_t* eight, Ints which) { return {_mm512_shuffle_epi8(_mm512_set1_epi64(peek<long long>(eight)), which.v)}; }
    // Sixteen bytes everywhere, and of them those that the bytes of this one (below 16) say.
    static Ints sixteen(const uint8_t* p) { return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))}; }
    Ints of_bytes(Ints sixteen) const { return {_mm512_shuffle_epi8(sixteen.v, v)}; }
    // Of sixteen floats the one that the lowest four bits of each lane say.
    Vec of_sixteen(const float* p) const { return {_mm512_permutexvar_ps(v, _mm512_loadu_ps(p))}; }
    // Of thirty-two that of the lowest five bits.
    Vec of_more(const float* p) const { return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), v, _mm512_loadu_ps(p + 16))}; }
    // COUNT words, from no more cache lines than they lie in; what is in the other lanes does not matter.
    template <int COUNT>
    static Ints some(const void* p) {
        if constexpr (COUNT <= 4) return {_mm512_zextsi128_si512(_mm_loadu_si128((const __m128i*)p))};
        const __m256i low = _mm256_loadu_si256((const __m256i*)p);
        if constexpr (COUNT <= 8) return {_mm512_zextsi256_si512(low)};
        if constexpr (COUNT <= 12) return {_mm512_inserti64x4(_mm512_castsi256_si512(low), _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p + 2)), 1)};
        return load(p);
    }
    // Input `from` of x, of 32 / BITS inputs a lane, in the place of this one's input TO.
    template <int BITS, int TO>
    Ints take(Ints x, int from) const {
        constexpr uint64_t bytes = 0x1111111111111111u * (BITS / 8 * 2 - 1) << TO * BITS / 8;
        return {_mm512_mask_shuffle_epi8(v, bytes, x.v, _mm512_load_si512(TAKEN<BITS>.at[from]))};
    }
    // Of M floats, four or eight, the one that the lowest two or three bits of each lane say; of eight the next bit is zero.
    template <int M>
    Vec of(const float* group) const {
        if constexpr (M == 4) return {_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(group)), v)};
        else return {_mm512_permutexvar_ps(v, _mm512_broadcast_f32x8(_mm256_loadu_ps(group)))};
    }
    // Bytes of four vectors become lanes of four bytes, one of each: of outputs in the order that `straight` undoes.
    static void beside(Ints (&v)[4]) {
        const __m512i ab[2] = {_mm512_unpacklo_epi8(v[0].v, v[1].v), _mm512_unpackhi_epi8(v[0].v, v[1].v)};
        const __m512i cd[2] = {_mm512_unpacklo_epi8(v[2].v, v[3].v), _mm512_unpackhi_epi8(v[2].v, v[3].v)};
        v[0] = {_mm512_unpacklo_epi16(ab[0], cd[0])}, v[1] = {_mm512_unpackhi_epi16(ab[0], cd[0])};
        v[2] = {_mm512_unpacklo_epi16(ab[1], cd[1])}, v[3] = {_mm512_unpackhi_epi16(ab[1], cd[1])};
    }
    static void straight(Ints (&v)[4]) {  // quarters are turned: of vector i quarter j becomes quarter i of vector j
        const __m512i low[2] = {_mm512_shuffle_i32x4(v[0].v, v[1].v, 0x44), _mm512_shuffle_i32x4(v[2].v, v[3].v, 0x44)};
        const __m512i high[2] = {_mm512_shuffle_i32x4(v[0].v, v[1].v, 0xee), _mm512_shuffle_i32x4(v[2].v, v[3].v, 0xee)};
        v[0] = {_mm512_shuffle_i32x4(low[0], low[1], 0x88)}, v[1] = {_mm512_shuffle_i32x4(low[0], low[1], 0xdd)};
        v[2] = {_mm512_shuffle_i32x4(high[0], high[1], 0x88)}, v[3] = {_mm512_shuffle_i32x4(high[0], high[1], 0xdd)};
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
    void store(void* p) const { _mm256_storeu_si256((__m256i*)p, v); }
    static constexpr int EIGHT = 8;
    static Ints eight(const void* p) { return load(p); }
    static Ints bytes(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))}; }
    Vec floats() const { return {_mm256_cvtepi32_ps(v)}; }
    Ints operator>>(int n) const { return {_mm256_srli_epi32(v, n)}; }
    Ints operator&(int m) const { return {_mm256_and_si256(v, _mm256_set1_epi32(m))}; }
    Ints operator<<(int n) const { return {_mm256_slli_epi32(v, n)}; }
    Ints operator|(int m) const { return {_mm256_or_si256(v, _mm256_set1_epi32(m))}; }
    Ints operator|(Ints o) const { return {_mm256_or_si256(v, o.v)}; }
    Ints less(Ints o) const { return {_mm256_sub_epi8(v, o.v)}; }
    Ints pairs(Ints x) const { return {_mm256_maddubs_epi16(v, x.v)}; }
    Ints with_pairs(Ints o) const { return {_mm256_add_epi16(v, o.v)}; }
    Ints with_fours(Ints pairs) const { return {_mm256_add_epi32(v, _mm256_madd_epi16(pairs.v, _mm256_set1_epi16(1)))}; }
    Ints four() const { return {_mm256_mullo_epi32(v, _mm256_set1_epi32(0x01010101))}; }
    Ints trits() const {
        const __m256i most = _mm256_subs_epu8(_mm256_avg_epu8(v, _mm256_setzero_si256()), _mm256_set1_epi8(2));
        return Ints{_mm256_avg_epu8(v, most)} >> 6 & 0x03030303;
    }
    Ints thrice() const { return {_mm256_add_epi8(_mm256_add_epi8(v, v), v)}; }
    static Ints pick(const int8_t* eight, Ints which) { return {_mm256_shuffle_epi8(_mm256_set1_epi64x(peek<long long>(eight)), which.v)}; }
    static Ints sixteen(const uint8_t* p) { return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p))}; }
    Ints of_bytes(Ints sixteen) const { return {_mm256_shuffle_epi8(sixteen.v, v)}; }
    Vec of_sixteen(const float* p) const {
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), v), high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p + 8), v);
        return {_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(v, 28)))};
    }
    Vec of_more(const float* p) const {
        return {_mm256_blendv_ps(of_sixteen(p).v, of_sixteen(p + 16).v, _mm256_castsi256_ps(_mm256_slli_epi32(v, 27)))};
    }
    template <int COUNT>
    static Ints some(const void* p) {
        if constexpr (COUNT <= 4) return {_mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)p))};
        else return load(p);
    }
    template <int BITS, int TO>
    Ints take(Ints x, int from) const {
        const __m256i ones = _mm256_set1_epi32(int(((1u << BITS) - 1) << TO * BITS));
        return {_mm256_blendv_epi8(v, _mm256_shuffle_epi8(x.v, _mm256_load_si256((const __m256i*)TAKEN<BITS>.at[from])), ones)};
    }
    template <int M>
    Vec of(const float* group) const {
        if constexpr (M == 4) return {_mm256_permutevar_ps(_mm256_broadcast_ps((const __m128*)group), v)};
        else return {_mm256_permutevar8x32_ps(_mm256_loadu_ps(group), v)};
    }
    static void beside(Ints (&v)[4]) {
        const __m256i ab[2] = {_mm256_unpacklo_epi8(v[0].v, v[1].v), _mm256_unpackhi_epi8(v[0].v, v[1].v)};
        const __m256i cd[2] = {_mm256_unpacklo_epi8(v[2].v, v[3].v), _mm256_unpackhi_epi8(v[2].v, v[3].v)};
        v[0] = {_mm256_unpacklo_epi16(ab[0], cd[0])}, v[1] = {_mm256_unpackhi_epi16(ab[0], cd[0])};
        v[2] = {_mm256_unpacklo_epi16(ab[1], cd[1])}, v[3] = {_mm256_unpackhi_epi16(ab[1], cd[1])};
    }
    static void straight(Ints (&v)[4]) {
        const __m256i a = _mm256_permute2x128_si256(v[0].v, v[1].v, 0x20), b = _mm256_permute2x128_si256(v[2].v, v[3].v, 0x20);
        const __m256i c = _mm256_permute2x128_si256(v[0].v, v[1].v, 0x31), d = _mm256_permute2x128_si256(v[2].v, v[3].v, 0x31);
        v[0] = {a}, v[1] = {b}, v[2] = {c}, v[3] = {d};
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
#elif defined(TRIMTAB_NEON)
struct Ints {
    uint32x4_t v;
    static uint8x16_t bytes_of(uint32x4_t v) { return vreinterpretq_u8_u32(v); }
    static Ints of_bytes(uint8x16_t b) { return {vreinterpretq_u32_u8(b)}; }
    static int8x16_t signed_of(uint8x16_t b) { return vreinterpretq_s8_u8(b); }
    static Ints zero() { return all(0); }
    static Ints all(int x) { return {vdupq_n_u32(uint32_t(x))}; }
    static Ints load(const void* p) { return {Vec::bits(p)}; }
    void store(void* p) const { vst1q_u8(static_cast<uint8_t*>(p), bytes_of(v)); }
    static constexpr int EIGHT = 4;
    static Ints eight(const void* p) { return load(p); }
    static Ints bytes(const uint8_t* p) { return {vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(peek<uint32_t>(p)))))}; }
    Vec floats() const { return {vcvtq_f32_s32(vreinterpretq_s32_u32(v))}; }
    Ints operator>>(int n) const { return {vshlq_u32(v, vdupq_n_s32(-n))}; }
    Ints operator<<(int n) const { return {vshlq_u32(v, vdupq_n_s32(n))}; }
    Ints operator&(int m) const { return {vandq_u32(v, vdupq_n_u32(uint32_t(m)))}; }
    Ints operator|(int m) const { return {vorrq_u32(v, vdupq_n_u32(uint32_t(m)))}; }
    Ints operator|(Ints o) const { return {vorrq_u32(v, o.v)}; }
    Ints less(Ints o) const { return of_bytes(vsubq_u8(bytes_of(v), bytes_of(o.v))); }
    Ints four() const { return {vmulq_n_u32(v, 0x01010101)}; }
    Ints trits() const {  // 3 b / 256 is one more from 86 on, and from 171 on
        const uint8x16_t b = bytes_of(v), none = vdupq_n_u8(0);
        return of_bytes(vsubq_u8(vsubq_u8(none, vcgeq_u8(b, vdupq_n_u8(86))), vcgeq_u8(b, vdupq_n_u8(171))));
    }
    Ints thrice() const { return of_bytes(vmulq_u8(bytes_of(v), vdupq_n_u8(3))); }
    static Ints pick(const int8_t* eight, Ints which) {
        const uint8x8_t all = vcreate_u8(peek<uint64_t>(eight));
        return of_bytes(vqtbl1q_u8(vcombine_u8(all, all), bytes_of(which.v)));
    }
    static Ints sixteen(const uint8_t* p) { return of_bytes(vld1q_u8(p)); }
    Ints of_bytes(Ints sixteen) const { return of_bytes(vqtbl1q_u8(bytes_of(sixteen.v), bytes_of(v))); }
    Vec of_sixteen(const float* p) const {
        const uint8x16_t at = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(v, vdupq_n_u32(15)), 0x04040404));
        const uint8x16x4_t all = {{bytes_of(Vec::bits(p)), bytes_of(Vec::bits(p + 4)), bytes_of(Vec::bits(p + 8)), bytes_of(Vec::bits(p + 12))}};
        return Vec::of(vreinterpretq_u32_u8(vqtbl4q_u8(all, at)));
    }
    Vec of_more(const float* p) const {
        const uint32x4_t upper = vceqq_u32(vandq_u32(v, vdupq_n_u32(16)), vdupq_n_u32(16));
        return Vec::of(vbslq_u32(upper, vreinterpretq_u32_f32(of_sixteen(p + 16).v), vreinterpretq_u32_f32(of_sixteen(p).v)));
    }
    template <int COUNT>
    static Ints some(const void* p) { return load(p); }
    template <int BITS, int TO>
    Ints take(Ints x, int from) const {
        const uint32x4_t its = vreinterpretq_u32_u8(vqtbl1q_u8(bytes_of(x.v), vld1q_u8(reinterpret_cast<const uint8_t*>(TAKEN<BITS>.at[from]))));
        return {vbslq_u32(vdupq_n_u32(((1u << BITS) - 1) << TO * BITS), its, v)};
    }
    template <int M>
    Vec of(const float* group) const {
        const uint8x16_t at = vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), vandq_u32(v, vdupq_n_u32(M - 1)), 0x04040404));
        const uint8x16_t low = bytes_of(Vec::bits(group));
        if constexpr (M == 4) return Vec::of(vreinterpretq_u32_u8(vqtbl1q_u8(low, at)));
        else return Vec::of(vreinterpretq_u32_u8(vqtbl2q_u8({{low, bytes_of(Vec::bits(group + 4))}}, at)));
    }
    static void beside(Ints (&v)[4]) {
        const uint16x8x2_t ab = {{vreinterpretq_u16_u8(vzip1q_u8(bytes_of(v[0].v), bytes_of(v[1].v))), vreinterpretq_u16_u8(vzip2q_u8(bytes_of(v[0].v), bytes_of(v[1].v)))}};
        const uint16x8x2_t cd = {{vreinterpretq_u16_u8(vzip1q_u8(bytes_of(v[2].v), bytes_of(v[3].v))), vreinterpretq_u16_u8(vzip2q_u8(bytes_of(v[2].v), bytes_of(v[3].v)))}};
        for (int i = 0; i < 2; ++i) {
            v[2 * i] = {vreinterpretq_u32_u16(vzip1q_u16(ab.val[i], cd.val[i]))};
            v[2 * i + 1] = {vreinterpretq_u32_u16(vzip2q_u16(ab.val[i], cd.val[i]))};
        }
    }
    static void straight(Ints (&)[4]) {}
    template <int BITS>
    Ints dot(Ints codes, Ints x) const {
        // A byte is twice its half, rounded down, and what is left: neither needs the sign.
        const uint8x16_t c = bytes_of(codes.v);
        const int8x16_t a = signed_of(bytes_of(x.v));
        const int32x4_t half = vdotq_s32(vdupq_n_s32(0), signed_of(vshrq_n_u8(c, 1)), a);
        const int32x4_t sum = vaddq_s32(vreinterpretq_s32_u32(v), vshlq_n_s32(half, 1));
        return {vreinterpretq_u32_s32(vdotq_s32(sum, signed_of(vandq_u8(c, vdupq_n_u8(1))), a))};
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
    void store(void* p) const { std::memcpy(p, v, sizeof v); }
    static constexpr int EIGHT = N;
    static Ints eight(const void* p) { return load(p); }
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
    static constexpr uint32_t EVEN = 0x00ff00ff;
    Ints trits() const {
        return each([&](int i) { return ((v[i] & EVEN) * 3 >> 8 & 0x00030003) | ((v[i] >> 8 & EVEN) * 3 & 0x03000300); });
    }
    Ints thrice() const {
        return each([&](int i) { return ((v[i] & EVEN) * 3 & EVEN) | ((v[i] >> 8 & EVEN) * 3 & EVEN) << 8; });
    }
    static Ints pick(const int8_t* eight, Ints which) {
        return each([&](int i) {
            uint32_t r = 0;
            for (int b = 0; b < 4; ++b) r |= uint32_t(uint8_t(eight[which.v[i] >> 8 * b & 7])) << 8 * b;
            return r;
        });
    }
    static Ints sixteen(const uint8_t* p) { return each([&](int i) { return peek<uint32_t>(p + i % 4 * 4); }); }
    Ints of_bytes(Ints sixteen) const {
        return each([&](int i) {
            uint32_t r = 0;
            for (int b = 0; b < 32; b += 8) r |= (sixteen.v[v[i] >> b >> 2 & 3] >> (v[i] >> b & 3) * 8 & 255) << b;
            return r;
        });
    }
    Vec of_sixteen(const float* p) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = p[v[i] & 15]; return r; }
    Vec of_more(const float* p) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = p[v[i] & 31]; return r; }
    template <int COUNT>
    static Ints some(const void* p) { return load(p); }
    template <int BITS, int TO>
    Ints take(Ints x, int from) const {
        constexpr uint32_t ones = ((1u << BITS) - 1) << TO * BITS;
        return each([&](int i) { return (v[i] & ~ones) | (x.v[i] >> from * BITS << TO * BITS & ones); });
    }
    template <int M>
    Vec of(const float* group) const { Vec r; for (int i = 0; i < N; ++i) r.v[i] = group[v[i] % M]; return r; }
    static void beside(Ints (&v)[4]) {
        uint8_t from[4][4 * N], to[4][4 * N];
        for (int k = 0; k < 4; ++k) v[k].store(from[k]);
        for (int o = 0; o < 4 * N; ++o)
            for (int k = 0; k < 4; ++k) to[o / N][o % N * 4 + k] = from[k][o];
        for (int k = 0; k < 4; ++k) v[k] = load(to[k]);
    }
    static void straight(Ints (&)[4]) {}
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

// The next field of a word, which goes on to the one after it. Five ternary codes are the digits of a byte / 256 in base 3.
template <int BITS>
inline Ints next_field(Ints& word) {
    if constexpr (BITS == TRITS) {
        const Ints four = word.trits();
        word = word.thrice();
        return four;
    } else {
        const Ints four = field<BITS>(word, 0);
        word = word >> BITS % 8;
        return four;
    }
}

// What the codes of a unit are looked up in, where they are codes of a table.
template <int BITS>
struct Table {
    Ints bytes;
    const float* floats;
    Table(const Weights& w) : floats(w.table) {
        if constexpr (BITS > LOOKUP) bytes = Ints::sixteen(w.bytes);
    }
};

// e4m3: what a code's lowest three bits are multiplied by, and what is added, by its upper five: below 128 numbers fall with their size.
constexpr int FLOAT8 = LOOKUP + 8;
template <>
struct Table<FLOAT8> {
    alignas(64) float times[32], plus[32];
    Table(const Weights& w) {
        for (int e = 0; e < 16; ++e) {
            const float step = w.table[0] * float(1 << std::max(e, 1)) / 1024, base = e ? step * 8 : 0;
            times[16 + e] = times[15 - e] = step;
            plus[16 + e] = base;
            plus[15 - e] = -(base + 7 * step);
        }
    }
};

// A unit of as many outputs as a Vec has lanes; its fields are taken in turn.
template <int BITS>
struct Unit {
    static constexpr int WIDTH = BITS % LOOKUP;
    Ints word[words_in<BITS>()];
    Unit() = default;
    // `apart`: bytes from one word of an output to its next.
    [[gnu::always_inline]] Unit(const std::byte* at, int64_t apart) {
        unrolled<words_in<BITS>()>(EACH(k) { word[k] = Ints::load(at + k * apart); });
    }
    // Field F, four codes a byte each; of a table the bytes that they stand for.
    template <int F>
    [[gnu::always_inline]] Ints next(const Table<BITS>& table) {
        Ints four;
        if constexpr (WIDTH == 3) {
            four = next_field<2>(word[F / 4]) | next_field<1>(word[2]) << 2;
        } else {
            four = next_field<WIDTH>(word[0]);
        }
        if constexpr (BITS > LOOKUP) return four.of_bytes(table.bytes);
        else return four;
    }
    // The code of one input as a float; of a table the step it stands for.
    [[gnu::always_inline]] Vec code(int input, const Table<BITS>& table) const {
        if constexpr (BITS == FLOAT8) {
            const Ints upper = word[0] >> (8 * input + 3);
            return upper.of_more(table.plus).fma((word[0] >> 8 * input & 7).floats(), upper.of_more(table.times));
        } else if constexpr (WIDTH == 3) {
            const Ints low = (word[input / 16] >> shift_of<2>(input % 16)) & 3, high = (word[2] >> shift_of<1>(input)) & 1;
            return (low | high << 2).of_sixteen(table.floats);
        } else if constexpr (BITS > LOOKUP) {
            return (word[0] >> shift_of<WIDTH>(input)).of_sixteen(table.floats);  // that has them again for whatever stands above
        } else {
            return code_of<WIDTH>(word[0], input);
        }
    }
};

// The products of codes with x: bytes of a table are as wide as codes of eight bits.
template <int BITS>
constexpr int as_wide() { return BITS > LOOKUP ? 8 : BITS; }

// The fields of units times four x each, summed up.
template <int BITS>
struct FieldSum {
    Ints sum = Ints::zero();
    template <int F>
    [[gnu::always_inline]] void add(Unit<BITS>& unit, Ints x, const Table<BITS>& table) {
        sum = sum.template dot<as_wide<BITS>()>(unit.template next<F>(table), x);
    }
    Vec floats() const { return sum.floats(); }
};
#if defined(__AVX512VNNI__)
// A digit is (3 b - what is left of 3 b) / 256, and so is a sum of digits times x: the bytes are multiplied as they are.
template <>
struct FieldSum<TRITS> {
    Ints sum = Ints::zero(), left = Ints::zero();
    template <int F>
    [[gnu::always_inline]] void add(Unit<TRITS>& unit, Ints x, const Table<TRITS>&) {
        sum = sum.dot<8>(unit.word[0], x);
        unit.word[0] = unit.word[0].thrice();
        left = left.dot<8>(unit.word[0], x);
    }
    Vec floats() const {
        return Ints{_mm512_srai_epi32(_mm512_sub_epi32(_mm512_mullo_epi32(sum.v, _mm512_set1_epi32(3)), left.v), 8)}.floats();
    }
};

// Codes that no table has to answer for, or of one bit, stay where they lie in their byte: a mask is all they take. What is equally
// far up has a sum of its own; each is a multiple of 2^how far.
template <int BITS>
constexpr bool in_place() { return BITS == 4 || BITS == 2 || BITS == LOOKUP + 1; }
template <int BITS>
    requires(in_place<BITS>())
struct FieldSum<BITS> {
    static constexpr int WIDTH = BITS % LOOKUP, COUNT = 8 / WIDTH;
    __m512i sum[COUNT];
    [[gnu::always_inline]] FieldSum() { unrolled<COUNT>(EACH(f) { sum[f] = _mm512_setzero_si512(); }); }
    template <int F>
    [[gnu::always_inline]] void add(const Unit<BITS>& unit, Ints x, const Table<BITS>&) {
        sum[F] = Ints{sum[F]}.template dot<8>(unit.word[0] & int(0x01010101u * (((1u << WIDTH) - 1) << WIDTH * F)), x).v;
    }
    [[gnu::always_inline]] Vec floats() const {
        __m512i all = sum[COUNT - 1];
        unrolled<COUNT - 1>(EACH(f) { all = _mm512_add_epi32(_mm512_srai_epi32(all, WIDTH), sum[COUNT - 2 - f]); });
        return Ints{all}.floats();
    }
};
// The same of three bits, the third ones apart: four of a byte, then the upper four.
template <>
struct FieldSum<3> {
    __m512i low[4], high[4];
    [[gnu::always_inline]] FieldSum() { unrolled<4>(EACH(f) { low[f] = high[f] = _mm512_setzero_si512(); }); }
    template <int F>
    [[gnu::always_inline]] void add(Unit<3>& unit, Ints x, const Table<3>&) {
        constexpr int at = F % 4;
        low[at] = Ints{low[at]}.dot<8>(unit.word[F / 4] & int(0x03030303u << 2 * at), x).v;
        if constexpr (F == 4) unit.word[2] = unit.word[2] >> 4;
        high[at] = Ints{high[at]}.dot<8>(unit.word[2] & int(0x01010101u << at), x).v;
    }
    [[gnu::always_inline]] Vec floats() const {
        __m512i all = low[3], third = high[3];
        unrolled<3>(EACH(f) {
            all = _mm512_add_epi32(_mm512_srai_epi32(all, 2), low[2 - f]);
            third = _mm512_add_epi32(_mm512_srai_epi32(third, 1), high[2 - f]);
        });
        return Ints{_mm512_add_epi32(all, _mm512_slli_epi32(third, 2))}.floats();
    }
};
#elif defined(__AVX2__)
// The products of a unit of small codes are summed up in 16 bits. Those of a table of two are summed up as they are.
template <int BITS>
    requires(BITS <= 4 || BITS == LOOKUP + 1)
struct FieldSum<BITS> {
    Ints sum = Ints::zero(), part;
    template <int F>
    [[gnu::always_inline]] void add(Unit<BITS>& unit, Ints x, const Table<BITS>& table) {
        Ints four;
        if constexpr (BITS > LOOKUP) four = next_field<1>(unit.word[0]);
        else four = unit.template next<F>(table);
        part = F ? part.with_pairs(four.pairs(x)) : four.pairs(x);
        if (F == inputs_in<BITS>() / 4 - 1) sum = sum.with_fours(part);
    }
    Vec floats() const { return sum.floats(); }
};
#endif

// f(input, code as a float) for every input of a unit, which are constants.
template <int BITS, class F>
[[gnu::always_inline]] inline void each_code(Unit<BITS> unit, const Table<BITS>& table, const F& f) {
    if constexpr (BITS == TRITS || BITS == 3) {
        unrolled<inputs_in<BITS>() / 4>(EACH(k) {
            const Ints four = unit.template next<k>(table);
            // A byte holds one below 2^4, as a field of four bits does.
            unrolled<4>(EACH(b) { f(std::integral_constant<int, 4 * k + b>(), code_of<4>(four, b)); });
        });
    } else {
        unrolled<inputs_in<BITS>()>(EACH(k) { f(k, unit.code(k, table)); });
    }
}

}  // namespace trimtab::ISA
