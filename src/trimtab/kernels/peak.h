// Nothing but multiplications and sums in registers: the bound of what does not wait for memory.
#pragma once
#include "ints.h"
#include "kernel.h"

namespace trimtab::ISA {

struct FloatSum {
    static constexpr int EACH = Vec::N;  // multiplications of one step
    Vec v = Vec::zero();
    static Vec load(const std::byte* p) { return Vec::load((const float*)p); }
    void add(Vec w, Vec x) { v = v.fma(w, x); }
    float first() const { float all[Vec::N]; v.store(all); return all[0]; }
};

#if defined(__AVX512BF16__)
struct HalfSum : FloatSum {
    static constexpr int EACH = 2 * Vec::N;
    void add(Vec w, Vec x) { v = v.dot(w, x); }
};
#else
using HalfSum = FloatSum;                // bfloat16 is multiplied as float32
#endif

struct CodeSum {
    static constexpr int EACH = 4 * Vec::N;
    Ints v = Ints::zero();
    static Ints load(const std::byte* p) { return Ints::load(p); }
    void add(Ints w, Ints x) { v = v.dot<4>(w, x); }
    float first() const { float all[Vec::N]; v.floats().store(all); return all[0]; }
};

// As in a tile of a kernel, two vectors of weights meet some rows of x; as many sums as hide one step behind the others.
template <class Sum>
int64_t multiplied(int64_t rounds, const std::byte* from, float* to) {
    constexpr int SIZE = 4 * Vec::N, ROWS = Vec::N == 16 ? 8 : 4;
    Sum sum[ROWS][2];
    decltype(Sum::load(from)) x[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) x[r] = Sum::load(from + (2 + r) * SIZE);
    for (int64_t i = 0; i < rounds; ++i) {
        asm volatile("" : "+r"(from));  // or products that do not change would be taken once
        const auto a = Sum::load(from), b = Sum::load(from + SIZE);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            sum[r][0].add(a, x[r]);
            sum[r][1].add(b, x[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) *to += sum[r][0].first() + sum[r][1].first();
    return rounds * ROWS * 2 * Sum::EACH;
}

inline int64_t multiply(Type type, int64_t rounds, const std::byte* from, float* to) {
    if (type == Type::f32) return multiplied<FloatSum>(rounds, from, to);
    return type == Type::bf16 ? multiplied<HalfSum>(rounds, from, to) : multiplied<CodeSum>(rounds, from, to);
}

}  // namespace trimtab::ISA
