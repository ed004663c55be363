// Every kernel of every instruction set this processor has, against the portable one, on layouts filled at random.
// Needs no Python: it also runs where a cross compiler and an emulator are all there is (make cross).
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "linear.h"

using namespace trimtab;

namespace {

std::mt19937 gen(7);
float normal() { return std::normal_distribution<float>()(gen); }
uint32_t below(uint32_t n) { return std::uniform_int_distribution<uint32_t>(0, n - 1)(gen); }
int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

using Memory = std::vector<std::byte>;
struct Case { Layout layout; Memory values, bits, columns, pointers, windows, scales, zeros, table; };

template <class T>
void put(Memory& m, T x) {
    const auto* p = reinterpret_cast<const std::byte*>(&x);
    m.insert(m.end(), p, p + sizeof x);
}

Memory numbers(const std::string& type, int64_t count) {
    Memory m;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = std::bit_cast<uint32_t>(normal());
        if (type == "f32") put(m, bits);
        else put(m, uint16_t(bits >> 16));
    }
    return m;
}

Memory noise(int64_t count) {
    Memory m;
    for (int64_t i = 0; i < count; ++i) put(m, uint8_t(below(256)));
    return m;
}

bool codes(const std::string& type) { return type[0] == 'i' || type[0] == 'l' || type == "t"; }

// Bytes of so many inputs of `rows` outputs.
int64_t size(const std::string& type, int64_t inputs, int64_t rows) {
    if (type == "t") return up(inputs, 20) * 4 * rows;
    const int bits = codes(type) ? type[1] - '0' : 0;
    return bits == 3 ? up(inputs, 32) * 12 * rows : bits ? up(inputs * bits, 32) * 4 * rows : type == "bf16" ? up(inputs, 2) * 4 * rows : inputs * 4 * rows;
}
Memory filled(const std::string& type, int64_t inputs, int64_t rows) {
    const int64_t bytes = size(type, inputs, rows);
    if (type == "t") {  // a byte stands for five digits of base 3
        Memory m;
        for (int64_t i = 0; i < bytes; ++i) put(m, uint8_t((below(243) * 256 + 242) / 243));
        return m;
    }
    return codes(type) ? noise(bytes) : numbers(type, bytes / (type == "f32" ? 4 : 2));
}

void sides(Case& c, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        put(c.scales, std::abs(normal()) / 100);
        if (c.layout.type[0] == 'i') put(c.zeros, uint8_t(below(4)));
    }
    if (c.layout.type == "l8") {  // e4m3
        for (int i = 0; i < 256; ++i) {
            const int size = i < 128 ? 127 - i : i - 128;
            const float step = std::ldexp(float(size % 8 + (size > 7 ? 8 : 0)), std::max(size / 8, 1) - 10);
            put(c.table, i < 128 ? -step : step);
        }
    } else if (c.layout.type[0] == 'l') {
        c.table = numbers("f32", 1 << (c.layout.type[1] - '0'));
    }
    c.layout.scale_type = "f32";
}

std::vector<Case> cases() {
    std::vector<Case> all;
    for (const auto& [out, in] : {std::pair<int64_t, int64_t>{64, 128}, {100, 192}, {33, 320}}) {
        const int64_t panels = up(out, PANEL);
        for (const std::string type : {"f32", "bf16", "i8", "i4", "i3", "i2", "t", "l8", "l4", "l3", "l2", "l1"}) {
            Case c{{"dense", type, out, in, PANEL, int(in), 1, 1, in, ""}, {}, {}, {}, {}, {}, {}, {}, {}};
            for (int64_t p = 0; p < panels; ++p) {
                const Memory panel = filled(type, in, PANEL);
                c.values.insert(c.values.end(), panel.begin(), panel.end());
            }
            if (codes(type)) sides(c, panels * PANEL);
            all.push_back(c);
            if (codes(type) && type != "i8" && type != "i4") continue;
            for (int64_t group : {in, int64_t(64)}) {
                if (!codes(type) && group < in) continue;
                const int64_t wide = up(out, STRIPE) * STRIPE;
                Case k{{"columns", type, out, in, STRIPE, int(in), 1, 1, group, ""}, {}, {}, {}, {}, {}, {}, {}, {}};
                k.values = codes(type) ? noise(in * wide * (type[1] - '0') / 8) : numbers(type, in * wide);
                if (codes(type)) sides(k, in / group * wide);
                all.push_back(k);
            }
            for (int m : {4, 8}) {
                const int64_t held = in / 2, words = up(held, 16) + (m == 8 ? up(held, 32) : 0);
                Case k{{"nm", type, out, in, PANEL, 1, m / 2, m, in, ""}, {}, noise(panels * words * 4 * PANEL), {}, {}, {}, {}, {}, {}};
                for (int64_t p = 0; p < panels; ++p) {
                    const Memory panel = filled(type, held, PANEL);
                    k.values.insert(k.values.end(), panel.begin(), panel.end());
                }
                if (codes(type)) sides(k, panels * PANEL);
                all.push_back(k);
            }
            for (int b : {16, 32, 64}) {
                if (out % b || in % b) continue;
                Case k{{"bsr", type, out, in, b, b, 1, 1, b, ""}, {}, {}, {}, {}, {}, {}, {}, {}};
                int64_t blocks = 0;
                put(k.pointers, blocks);
                for (int64_t r = 0; r < out / b; ++r) {
                    for (int64_t col = 0; col < in / b; ++col)
                        if (below(2)) put(k.columns, int32_t(col)), ++blocks;
                    put(k.pointers, blocks);
                }
                for (int64_t i = 0; i < blocks; ++i) {
                    const Memory block = filled(type, b, b);
                    k.values.insert(k.values.end(), block.begin(), block.end());
                }
                if (codes(type)) sides(k, blocks * b);
                all.push_back(k);
            }
        }
        for (const std::string type : {"f32", "bf16", "i8"}) {
            Case mask{{"bitmask", type, out, in, PANEL, 1, 1, 1, in, ""}, {}, noise(panels * in * 4), {}, {}, {}, {}, {}, {}};
            int64_t kept = 0;
            for (std::byte b : mask.bits) kept += std::popcount(uint8_t(b));
            mask.values = codes(type) ? noise(kept) : numbers(type, kept);
            mask.values.resize(mask.values.size() + SLACK);
            if (codes(type)) sides(mask, panels * PANEL);
            all.push_back(mask);
            if (codes(type)) continue;
            const int wide = int(std::min<int64_t>(SELL_WINDOW, in));
            Case rows{{"sell", type, out, in, SELL_ROWS, wide, 1, 1, 0, ""}, {}, {}, {}, {}, {}, {}, {}, {}};
            int64_t steps = 0;
            put(rows.pointers, steps);
            for (int64_t p = 0; p < up(out, SELL_ROWS); ++p) {
                for (uint32_t n = below(9); n > 0; --n, ++steps) put(rows.windows, int32_t(below(uint32_t(in - wide + 1))));
                put(rows.pointers, steps);
            }
            for (int64_t i = 0; i < steps * SELL_ROWS * SELL_ENTRIES; ++i) put(rows.columns, uint8_t(below(uint32_t(wide))));
            rows.values = numbers(type, steps * SELL_ROWS * SELL_ENTRIES);
            all.push_back(rows);
        }
    }
    return all;
}

std::vector<float> result(const Linear& l, const Kernel* k, const std::vector<float>& x, int64_t batch) {
    std::vector<float> y(size_t(batch * l.weights().out), NAN);
    const Job job{&l.weights(), k, y.data()};
    run({&job, 1}, x.data(), batch, 2);
    return y;
}

}  // namespace

int main() {
    int ran = 0, wrong = 0;
    for (const Case& c : cases()) {
        const Linear l(c.layout, {c.values, c.bits, c.columns, c.pointers, c.windows, c.scales, c.zeros, c.table, {}, {}, {}});
        for (int64_t batch : {1, 3, 20, 29}) {
            std::vector<float> x(size_t(batch * l.weights().in));
            std::generate(x.begin(), x.end(), [] { return below(3) ? normal() : 0.0f; });  // as gates leave them
            std::vector<const Kernel*> these = l.kernels(Type::i8);
            for (const Kernel* k : l.kernels(Type::bf16))
                if (std::find(these.begin(), these.end(), k) == these.end()) these.push_back(k);
            for (const Kernel* k : these) {
                const Kernel* plain = nullptr;  // the portable one that rounds x as this one does; none rounds to bfloat16
                for (const Kernel* o : these)
                    if (o->isa == Isa::portable && o->activation == (k->activation == Type::i8 ? Type::i8 : Type::f32)) plain = o;
                if (!plain) continue;
                const std::vector<float> want = result(l, plain, x, batch), got = result(l, k, x, batch);
                float top = 0, off = 0;
                for (size_t i = 0; i < want.size(); ++i) {
                    top = std::max(top, std::abs(want[i]));
                    off = std::isfinite(got[i]) ? std::max(off, std::abs(want[i] - got[i])) : INFINITY;
                }
                ++ran;
                if (off > top * (k->activation == Type::bf16 ? 1e-2f : 2e-5f)) {
                    ++wrong;
                    std::printf("%s: [%ld, %ld], %ld rows: off by %g of %g\n", k->name, long(c.layout.out), long(c.layout.in), long(batch), double(off), double(top));
                }
            }
        }
    }
    std::printf("%d runs of kernels, %d wrong\n", ran, wrong);
    return wrong || !ran;
}
