// Which instruction sets this processor has and the operating system saves.
#include "kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace trimtab {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::avx512bf16: return "avx512bf16";
        case Isa::neon: return "neon";
        default: return "portable";
    }
}

#if defined(__x86_64__)
namespace {
struct Flags { bool avx2, avx512, avx512bf16; };

Flags look() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return {};  // osxsave
    const bool fma = c >> 12 & 1, popcnt = c >> 23 & 1, f16c = c >> 29 & 1;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 6) == 6, zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
    Flags f{};
    f.avx2 = ymm && fma && popcnt && f16c && (b >> 5 & 1) && (b >> 8 & 1);                                              // avx2, bmi2
    f.avx512 = f.avx2 && zmm && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);              // f, dq, bw, vl
    const bool vbmi = (c >> 1 & 1) && (c >> 6 & 1), vnni = c >> 11 & 1;
    f.avx512bf16 = f.avx512 && vbmi && vnni && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    return f;
}
}  // namespace

bool has(Isa isa) {
    static const Flags f = look();
    switch (isa) {
        case Isa::portable: return true;
        case Isa::avx2: return f.avx2;
        case Isa::avx512: return f.avx512;
        case Isa::avx512bf16: return f.avx512bf16;
        default: return false;
    }
}
#elif defined(__aarch64__)
bool has(Isa isa) {
#if defined(__linux__)
    const bool dot = getauxval(AT_HWCAP) >> 20 & 1;  // products of four bytes, which came with ARMv8.2
#else
    const bool dot = true;
#endif
    return isa == Isa::portable || (isa == Isa::neon && dot);
}
#else
bool has(Isa isa) { return isa == Isa::portable; }
#endif

}  // namespace trimtab
