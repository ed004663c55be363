#include "linear.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "pool.h"

namespace trimtab {
namespace {

[[noreturn]] void bad(const std::string& what) { throw std::invalid_argument(what); }

const std::vector<Table>& tables() {
    static const std::vector<Table> all{portable_kernels(),
#if defined(__x86_64__)
                                        avx2_kernels(), avx512_kernels(), avx512bf16_kernels(),
#elif defined(__aarch64__)
                                        neon_kernels(),
#endif
    };
    return all;
}

Type type_of(const std::string& name) {
    for (Type t : TYPES)
        if (name == type_name(t)) return t;
    bad("unknown type " + name + "; there are f32, bf16, i8, i4, i3, i2, t, v, l8, l4, l3, l2 and l1");
}

int64_t size_of(Type t) { return t == Type::f32 ? 4 : t == Type::i8 ? 1 : 2; }
int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Floats that maps give side by side before what follows takes them, out of the second-level cache.
constexpr int64_t STRETCH = 96 << 10;

template <class T>
void copy(std::span<const std::byte> from, std::vector<T>& to, int64_t count, const std::string& what) {
    if (int64_t(from.size()) != count * int64_t(sizeof(T)))
        bad(std::to_string(count) + " " + what + " expected, " + std::to_string(from.size() / sizeof(T)) + " given");
    to.resize(size_t(count));
    if (count) std::memcpy(to.data(), from.data(), from.size());
}

}  // namespace

const char* type_name(Type type) {
    switch (type) {
        case Type::f32: return "f32";
        case Type::bf16: return "bf16";
        case Type::f16: return "f16";
        case Type::i8: return "i8";
        case Type::i4: return "i4";
        case Type::i3: return "i3";
        case Type::i2: return "i2";
        case Type::v: return "v";
        case Type::l8: return "l8";
        case Type::l4: return "l4";
        case Type::l3: return "l3";
        case Type::l2: return "l2";
        case Type::l1: return "l1";
        default: return "t";
    }
}

std::vector<const Kernel*> all_kernels() {
    std::vector<const Kernel*> found;
    for (const Table& t : tables())
        for (int64_t i = 0; i < t.count; ++i) found.push_back(t.first + i);
    return found;
}

const Table& table(const std::string& isa) {
    const Table* found = nullptr;
    for (const Table& t : tables())
        if (has(t.first->isa) && (isa.empty() || isa == isa_name(t.first->isa))) found = &t;
    if (!found) bad("no instruction set " + isa + " here");
    return *found;
}

namespace {

// The numbers of e4m3 from its zero on; the last would be 480, which is its NaN and meant by no code.
float e4m3(int size) {
    return std::ldexp(float(size % 8 + (size > 7 ? 8 : 0)), std::max(size / 8, 1) - 10);
}

// A table of 256 is that of e4m3 times something.
void float8(Weights& w, std::span<const std::byte> table) {
    float steps[256];
    std::memcpy(steps, table.data(), sizeof steps);
    w.table[0] = steps[254] / e4m3(126);
    for (int i = 0; i < 256; ++i) {
        const float number = (i < 128 ? -e4m3(127 - i) : e4m3(i - 128)) * w.table[0];
        if (!(std::abs(steps[i] - number) <= 1e-6f * std::abs(number))) bad("dense: a table of 256 steps has a kernel where it is that of e4m3 alone");
    }
}

// The table of a map: as it is, and in eight bits by the step that leaves the least error.
void tabulate(Weights& w, std::span<const std::byte> table) {
    const int count = 1 << code_bits(w.type);
    std::memcpy(w.table, table.data(), table.size());
    float most = 0;
    for (int i = 0; i < count; ++i) {
        if (!std::isfinite(w.table[i])) bad("dense: a step of the table is not finite");
        most = std::max(most, std::abs(w.table[i]));
    }
    for (int i = count; i < 16; ++i) w.table[i] = w.table[i % count];  // whatever stands above a code's bits
    float least = INFINITY;
    for (int n = 127; n >= 64 && most > 0; --n) {
        const float step = most / float(n);
        float off = 0;
        for (int i = 0; i < count; ++i) off += std::abs(w.table[i] - std::nearbyint(w.table[i] / step) * step);
        if (off < least * 0.999f) least = off, w.step = step;
    }
    for (int i = 0; i < 16; ++i) w.bytes[i] = uint8_t(128 + int(std::nearbyint(w.table[i] / w.step)));
}

}  // namespace

Linear::Linear(const Layout& l, const Buffers& b) {
    bytes_ = int64_t(b.values.size() + b.bits.size() + b.columns.size() + b.pointers.size() + b.windows.size() + b.scales.size() + b.zeros.size() + b.table.size() + b.book.size() + b.residual.size() + b.residual_book.size());
    if (l.out < 1 || l.in < 1 || l.out > INT32_MAX || l.in > INT32_MAX) bad("a linear map needs 1 to 2^31 - 1 outputs and inputs");
    const Type type = type_of(l.type);
    if (type == Type::f16) bad("weights of type f16 have no kernel; there are f32, bf16 and codes");
    w_ = {l.out, l.in, l.rows, l.cols, l.n, l.m, l.group, type, Type::f32, b.values.data(), b.bits.data(), nullptr, nullptr, nullptr, nullptr, nullptr, {}, {}, 1};
    if (l.rows < 1 || l.rows > 1024 || l.cols < 1 || l.cols > l.in) bad("a panel is 1 to 1024 outputs high and at most as wide as the matrix");
    const bool codes = unit_inputs(type) > 0;
    const std::string& f = l.format;
    if ((type == Type::v) != (f == "book")) bad(f + ": indices of vectors, and nothing else, are a book");
    if (f != "book" && !(b.book.empty() && b.residual.empty() && b.residual_book.empty())) bad(f + ": only a book has vectors");
    auto want = [&](std::span<const std::byte> have, int64_t bytes, const char* what) {
        if (int64_t(have.size()) != bytes) bad(f + ": " + std::to_string(bytes) + " bytes of " + what + " expected, " + std::to_string(have.size()) + " given");
    };
    // Bytes of `inputs` values of `rows` outputs.
    auto size = [&](int64_t inputs) {
        if (codes) return up(inputs, unit_inputs(type)) * unit_words(type) * 4 * l.rows;
        return (type == Type::bf16 ? up(inputs, 2) * 2 : inputs) * size_of(type) * l.rows;
    };
    int64_t scaled = w_.panels();  // things that have scales of their own: panels, or blocks
    if (codes) {
        const int64_t whole = type == Type::t ? unit_inputs(type) : 32;
        if (l.group < 1 || l.group > l.in || (f != "bsr" && l.group < l.in && l.group % whole))
            bad(f + ": a group of " + l.type + " codes is a multiple of " + std::to_string(whole) + " inputs, or all of them");
        if (type == Type::t && (f != "dense" || !b.zeros.empty())) bad(f + ": ternary codes are dense, and have no zero points");
        if ((type == Type::i3 || by_table(type)) && f != "dense") bad(f + ": codes of " + l.type + " are dense");
        if (by_table(type)) {
            if (!b.zeros.empty()) bad(f + ": codes of a table have no zero points");
            want(b.table, int64_t(sizeof(float)) << code_bits(type), "a table");
            type == Type::l8 ? float8(w_, b.table) : tabulate(w_, b.table);
        } else if (!b.table.empty()) {
            bad(f + ": only codes of " + "l8, l4, l3, l2 and l1" + " have a table");
        }
        w_.scale_type = type_of(l.scale_type);
        if (w_.scale_type != Type::f32 && w_.scale_type != Type::f16) bad(f + ": scales are f32 or f16");
    } else if ((f != "book" && !b.scales.empty()) || !b.zeros.empty() || !b.table.empty()) {
        bad(f + ": only codes have scales and zero points");
    }
    if (f == "dense") {
        if (l.cols != l.in || l.rows != PANEL) bad("dense: a panel is 32 outputs high and as wide as the matrix");
        want(b.values, w_.panels() * size(l.in), "values");
    } else if (f == "columns") {
        if (l.cols != l.in || l.rows != STRIPE) bad("columns: they are divided every 128 outputs, and there is one an input");
        if (codes && type != Type::i8 && type != Type::i4) bad("columns: codes of " + l.type + " have no kernel");
        want(b.values, l.in * w_.panels() * STRIPE * (codes ? code_bits(type) : 8 * size_of(type)) / 8, "values");
    } else if (f == "bsr") {
        copy(b.pointers, pointers_, w_.panels() + 1, "pointers");
        if (pointers_.front() != 0) bad("bsr: the first panel does not begin at block 0");
        for (size_t i = 1; i < pointers_.size(); ++i)
            if (pointers_[i] < pointers_[i - 1]) bad("bsr: pointers fall");
        const int64_t blocks = pointers_.back();
        if (l.in % l.cols || l.out % l.rows) bad("bsr: the blocks do not divide the matrix");
        // Blocks of one input are packed as the inputs of a panel are, to whole pairs or words.
        const bool single = l.cols == 1;
        const int64_t together = !single ? 1 : codes ? unit_inputs(type) : type == Type::bf16 ? 2 : 1;
        for (size_t i = 1; i < pointers_.size(); ++i) {
            const int64_t count = pointers_[i] - pointers_[i - 1];
            if (count % together) bad("bsr: a block row is not filled up to whole words");
            if (count > up(l.in / l.cols, together) * together) bad("bsr: more blocks than places");
        }
        copy(b.columns, columns_, blocks, "columns");
        for (int32_t c : columns_)
            if (c < 0 || c >= l.in / l.cols) bad("bsr: a block lies outside the matrix");
        want(b.values, single ? size(blocks) : blocks * size(l.cols), "values");
        if (codes && l.group != (single ? l.in : l.cols)) bad("bsr: a block's codes share one scale an output, blocks of one input all of an output's");
        scaled = single ? w_.panels() : blocks;
        w_.columns = columns_.data();
    } else if (f == "bitmask") {
        if (codes && type != Type::i8) bad("bitmask: codes of " + l.type + " have no kernel");
        if (l.rows != PANEL) bad("bitmask: panels are 32 outputs high");
        const int64_t side = type == Type::bf16 ? 2 : codes ? 4 : 1, masks = up(l.in, side) * side;  // of 32 places, a panel
        if (int64_t(b.bits.size()) != w_.panels() * masks * 4) bad("bitmask: the bits do not cover the matrix");
        pointers_.assign(1, 0);
        for (int64_t p = 0; p < w_.panels(); ++p) {
            int64_t kept = 0;
            for (int64_t i = 0; i < masks; ++i) {
                uint32_t mask;
                std::memcpy(&mask, w_.bits + (p * masks + i) * 4, 4);
                kept += std::popcount(mask);
            }
            pointers_.push_back(pointers_.back() + kept);
        }
        if (int64_t(b.values.size()) < pointers_.back() * size_of(type) + SLACK) bad("bitmask: fewer values than bits, or no slack behind them");
    } else if (f == "sell") {
        if (codes) bad("sell: codes have no kernel");
        if (l.rows != SELL_ROWS || l.cols != std::min<int64_t>(SELL_WINDOW, l.in)) bad("sell: panels are 16 outputs high and windows 128 inputs wide");
        copy(b.pointers, pointers_, w_.panels() + 1, "pointers");
        if (pointers_.front() != 0) bad("sell: the first panel does not begin at step 0");
        for (size_t i = 1; i < pointers_.size(); ++i)
            if (pointers_[i] < pointers_[i - 1]) bad("sell: pointers fall");
        const int64_t steps = pointers_.back(), slots = SELL_ROWS * SELL_ENTRIES;
        if (steps > int64_t(b.windows.size()) / 4) bad("sell: fewer windows than steps");
        want(b.windows, steps * 4, "windows");
        want(b.columns, steps * slots, "columns");
        want(b.values, steps * slots * size_of(type), "values");
        w_.bits = b.windows.data();
        w_.offsets = reinterpret_cast<const uint8_t*>(b.columns.data());
        for (int64_t s = 0; s < steps; ++s) {
            int32_t window;
            std::memcpy(&window, w_.bits + s * 4, 4);
            if (window < 0 || window > l.in - l.cols) bad("sell: a window lies outside the matrix");
        }
        for (int64_t i = 0; i < steps * slots; ++i)
            if (w_.offsets[i] >= l.cols) bad("sell: an entry lies outside its window");
    } else if (f == "nm") {
        if (l.m < 2 || l.n < 1 || l.n > l.m || l.in % l.m) bad("nm: want 0 < n <= m, and m to divide the inputs");
        if (l.rows != PANEL) bad("nm: panels are 32 outputs high");
        if (l.m != 4 && l.m != 8) bad("nm: only groups of 4 and of 8 have a kernel");
        if (codes && l.n * 2 != l.m) bad("nm: codes have kernels as 2:4 and 4:8 only");
        const int64_t held = l.in / l.m * l.n, words = up(held, 16) + (l.m == 8 ? up(held, 32) : 0);
        want(b.values, w_.panels() * size(held), "values");
        want(b.bits, w_.panels() * words * 4 * PANEL, "bits");
    } else if (f == "book") {
        books(l, b);
    } else {
        bad("unknown format " + f + "; there are dense, columns, bsr, bitmask, sell, nm and book");
    }
    if (codes) {
        const int64_t count = scaled * (f == "bsr" ? 1 : w_.groups()) * l.rows;
        want(b.scales, count * size_of(w_.scale_type), "scales");
        w_.scales = b.scales.data();
        if (!b.zeros.empty()) {
            want(b.zeros, count, "zero points");
            w_.zeros = reinterpret_cast<const uint8_t*>(b.zeros.data());
        }
    }
    if (f == "bsr" || f == "bitmask" || f == "sell") w_.pointers = pointers_.data();
    if (l.act_bits || l.act_scale != 0) {
        if (!codes || l.act_bits < 2 || l.act_bits > 8) bad(f + ": x is rounded to 2 to 8 bits where it meets codes");
        if (!(l.act_scale >= 0 && std::isfinite(l.act_scale))) bad(f + ": a scale of x is finite, and above 0");
        w_.act_bits = l.act_bits, w_.act_scale = l.act_scale;
    }
    for (const Kernel* k : all_kernels()) {
        if (k->format != f || k->type != w_.type || !has(k->isa) || !k->takes(w_)) continue;
        const bool told = w_.act_bits > 0;  // then it is not left to who runs it
        if (told ? k->activation == Type::i8 : k->activation == Type::f32) kernels_[0].push_back(k);
        if (told ? k->activation == Type::i8 : k->activation != Type::i8) kernels_[1].push_back(k);
        if (!told || k->activation == Type::i8) kernels_[2].push_back(k);
    }
}

namespace {

float half(uint16_t h) {  // 5 bits of exponent, 10 of fraction
    const float size = (h >> 10 & 31) == 31 ? INFINITY : std::ldexp(float((h & 0x3ff) | ((h >> 10 & 31) ? 0x400 : 0)), std::max(h >> 10 & 31, 1) - 25);
    return h >> 15 ? -size : size;
}

}  // namespace

void Linear::books(const Layout& l, const Buffers& b) {
    if (l.rows > BESIDE || l.cols != 1 || l.n < 1 || l.n > 16 || l.m < 0 || l.m > 16)
        bad("book: indices have 1 to 16 bits, and vectors 1 to 16 outputs of one input");
    if (l.scale_type != "f16") bad("book: scales are f16");
    const int v = l.rows;
    w_.vector = v;
    w_.rows = BESIDE * v;
    w_.wide = v <= 4 ? 4 : v <= 8 ? 8 : 16;
    w_.group = l.in;
    const int64_t units = w_.panels() * up(l.in, UNIT_INPUTS), count[] = {int64_t(1) << l.n, l.m ? int64_t(1) << l.m : 0};
    auto want = [](std::span<const std::byte> have, int64_t bytes, const char* what) {
        if (int64_t(have.size()) != bytes) bad("book: " + std::to_string(bytes) + " bytes of " + what + " expected, " + std::to_string(have.size()) + " given");
    };
    want(b.values, units * 8 * l.n, "indices");
    want(b.book, count[0] * 2 * v, "vectors");
    want(b.residual, units * 8 * l.m, "second indices");
    want(b.residual_book, count[1] * 2 * v, "second vectors");
    want(b.scales, l.out * 2, "scales");
    w_.scales = b.scales.data();
    w_.scale_type = Type::f16;
    for (int64_t i = 0; i < l.out; ++i) {
        uint16_t h;
        std::memcpy(&h, w_.scales + i * 2, 2);
        if (!std::isfinite(half(h))) bad("book: a scale is not finite");
    }
    // As floats, on cache lines: a vector that lies across two costs twice.
    floats_.assign(size_t((count[0] + count[1]) * w_.wide + 16), 0.0f);
    float* floats = floats_.data() + (-reinterpret_cast<uintptr_t>(floats_.data()) & 63) / 4;
    float most = 0;
    for (int i = 0; i < 2; ++i) {
        const std::span<const std::byte> from = i ? b.residual_book : b.book;
        float largest = 0;
        w_.books[i] = {i ? l.m : l.n, i ? b.residual.data() : b.values.data(), floats, nullptr};
        for (int64_t k = 0; k < count[i] * v; ++k) {
            uint16_t h;
            std::memcpy(&h, from.data() + k * 2, 2);
            const float x = half(h);
            if (!std::isfinite(x)) bad("book: a vector is not finite");
            floats[k / v * w_.wide + k % v] = x;
            largest = std::max(largest, std::abs(x));
        }
        most += largest;
        floats += count[i] * w_.wide;
    }
    // In eight bits, 128 being zero, and the sum of both books in eight bits too.
    w_.step = most > 0 ? most / (l.m ? 126.0f : 127.0f) : 1;
    const bool small = l.n <= 8 && l.m <= 8;
    if (!small && v > 8) return;
    int64_t sizes[2];
    for (int i = 0; i < 2; ++i) sizes[i] = !count[i] ? 0 : small ? v * w_.books[i].tables() : count[i] * 8;
    bytes_of_books_.assign(size_t(sizes[0] + sizes[1] + 64), 0);
    uint8_t* bytes = bytes_of_books_.data() + (-reinterpret_cast<uintptr_t>(bytes_of_books_.data()) & 63);
    for (int i = 0; i < 2; ++i) {
        for (int64_t k = 0; k < count[i]; ++k)
            for (int j = 0; j < v; ++j) {
                const int code = int(std::nearbyint(w_.books[i].floats[k * w_.wide + j] / w_.step));
                bytes[small ? j * w_.books[i].tables() + k : k * 8 + j] = uint8_t(code + (i ? 0 : 128));
            }
        w_.books[i].bytes = bytes;
        bytes += sizes[i];
    }
}

const std::vector<const Kernel*>& Linear::kernels(Type narrowest) const {
    return kernels_[narrowest == Type::i8 ? 2 : narrowest == Type::bf16 ? 1 : 0];
}

const Kernel* Linear::best(Type narrowest, int64_t batch) const {
    const Kernel* found = nullptr;
    for (const Kernel* k : kernels(narrowest))
        if (batch <= k->until) found = k;
    return found;
}

namespace {

// x, made ready once for every job that wants it alike.
class Prepared {
public:
    Prepared(std::span<const Job> jobs, const float* x, int64_t batch, int threads) : x_(x), batch_(batch) {
        thread_local std::vector<std::byte> memory;
        thread_local std::vector<Ready> ready;
        ready.clear();
        const int64_t in = jobs[0].weights->in;
        int64_t bytes = 0;
        for (const Job& j : jobs) {
            const Ready r{j.kernel->wants(*j.weights), j.kernel->prepare, nullptr};
            if (std::any_of(ready.begin(), ready.end(), [&](const Ready& o) { return o.input == r.input && o.prepare == r.prepare; })) continue;
            ready.push_back(r);
            bytes += up(r.input.bytes(in, batch), 64) * 64;
        }
        memory.resize(std::max(memory.size(), size_t(bytes) + 64 + SLACK));
        std::byte* at = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 63);
        for (Ready& r : ready) {
            const int64_t size = r.input.bytes(in, batch);
            if (!size) continue;
            r.at = at;
            at += up(size, 64) * 64;
            // A few rows are ready before the other threads have woken up.
            parallel(batch, batch * in < (64 << 10) ? 1 : threads, [&](int64_t begin, int64_t end, int) { r.prepare(r.input, x, in, batch, begin, end, r.at); });
        }
        ready_ = ready;
    }

    // Panels from .. to of a job, on this thread.
    void run(const Job& j, int64_t from, int64_t to) const {
        j.kernel->run(*j.weights, of(j), batch_, j.y, from, to, memory(j));
    }

    // What a region of a job whose kernel has parts adds up to, on this thread.
    void part(const Job& j, const Region& region, float* sums) const {
        j.kernel->part(*j.weights, of(j), batch_, region, sums, memory(j));
    }

private:
    struct Ready { Input input; Prepare prepare; std::byte* at; };

    const void* of(const Job& j) const {
        const Input input = j.kernel->wants(*j.weights);
        for (const Ready& r : ready_)
            if (r.at && r.input == input && r.prepare == j.kernel->prepare) return r.at;
        return x_;
    }

    // This thread's own, on a cache line: a vector that lies across two costs twice.
    float* memory(const Job& j) const {
        thread_local std::vector<float> scratch;
        scratch.resize(std::max(scratch.size(), size_t(j.kernel->scratch(*j.weights, batch_)) + 16));
        return scratch.data() + (-reinterpret_cast<uintptr_t>(scratch.data()) & 63) / 4;
    }

    std::span<const Ready> ready_;  // lies with the thread that made it, until that prepares the next
    const float* x_;
    int64_t batch_;
};

}  // namespace

namespace {

// Jobs whose kernels go over regions of a few rows. Their inputs are divided into as many parts on any number of threads, whose sums are
// added in the same order: how many there are changes no bit. More threads than parts divide the outputs as well, at the cost of shorter
// columns.
class Parts {
public:
    Parts(std::span<const Job> jobs, const Prepared& prepared, int64_t batch, int threads)
        : batch_(batch), count_(std::clamp(int64_t(std::bit_floor(uint64_t(jobs[0].weights->in / PART))), int64_t(1), MOST)) {
        int64_t all = 0;
        for (const Job& j : jobs)
            if (j.kernel->divides(batch)) all += size(j);
        if (!all) return;
        thread_local std::vector<float> memory;
        float* at = sized(memory, all + 16);
        sums_ = at += (-reinterpret_cast<uintptr_t>(at) & 63) / 4;
        const int64_t in = jobs[0].weights->in, across = up(threads, count_);
        const auto input = [&](int64_t k) { return k == count_ ? in : in * k / count_ / ALIGNED * ALIGNED; };
        parallel(count_ * across, threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t region = begin; region < end; ++region) {
                const int64_t i = region % count_, o = region / count_;
                float* to = sums_;
                for (const Job& j : jobs) {
                    if (!j.kernel->divides(batch_)) continue;
                    const auto output = [&](int64_t k) { return j.weights->panels() * k / across * j.weights->rows; };
                    prepared.part(j, {input(i), input(i + 1), output(o), output(o + 1)}, to + i * rows(j));
                    to += size(j);
                }
            }
        });
    }

    // Outputs begin .. end of the job whose sums begin at `first`.
    void add(const Job& j, int64_t first, int64_t begin, int64_t end) const {
        const int64_t wide = j.weights->panels() * j.weights->rows;
        for (int64_t r = 0; r < batch_; ++r) {
            const float* from = sums_ + first + r * wide;
            float* to = j.y + r * j.weights->out;
            std::copy(from + begin, from + end, to + begin);
            for (int64_t i = 1; i < count_; ++i)
                for (int64_t o = begin; o < end; ++o) to[o] += from[i * rows(j) + o];
        }
    }

    int64_t size(const Job& j) const { return count_ * rows(j); }

private:
    static constexpr int64_t PART = 1024, MOST = 4, ALIGNED = 128;  // inputs of a part, parts, what they begin at
    int64_t rows(const Job& j) const { return batch_ * j.weights->panels() * j.weights->rows; }

    float* sums_ = nullptr;
    int64_t batch_, count_;
};

}  // namespace

void run(std::span<const Job> jobs, const float* x, int64_t batch, int threads) {
    if (!batch || jobs.empty()) return;
    const Prepared prepared(jobs, x, batch, threads);
    const Parts parts(jobs, prepared, batch, threads);
    int64_t panels = 0;
    for (const Job& j : jobs) panels += j.weights->panels();
    parallel(panels, threads, [&](int64_t begin, int64_t end, int) {
        int64_t first = 0, sums = 0;
        for (const Job& j : jobs) {
            const int64_t count = j.weights->panels(), rows = j.weights->rows, from = std::max<int64_t>(begin - first, 0), to = std::min(end - first, count);
            first += count;
            const bool divides = j.kernel->divides(batch);
            if (from < to) divides ? parts.add(j, sums, from * rows, std::min(to * rows, j.weights->out)) : prepared.run(j, from, to);
            if (divides) sums += parts.size(j);
        }
    });
}

bool side_by_side(std::span<const Job> jobs) {
    return std::all_of(jobs.begin(), jobs.end(), [&](const Job& j) { return j.weights->rows == jobs[0].weights->rows && j.weights->out == jobs[0].weights->out && j.kernel->part == jobs[0].kernel->part; });
}

void run(std::span<const Job> jobs, const float* x, int64_t batch, int threads, const Then& then) {
    if (!batch) return;
    const Prepared prepared(jobs, x, batch, threads);
    const Weights& w = *jobs[0].weights;
    const Parts parts(jobs, prepared, batch, threads);
    const bool divides = jobs[0].kernel->divides(batch);
    const int64_t some = std::max<int64_t>(1, STRETCH / (w.rows * batch * int64_t(jobs.size())));
    parallel(w.panels(), threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t p = begin; p < end; p += some) {
            const int64_t q = std::min(end, p + some);
            int64_t first = 0;
            for (const Job& j : jobs) {
                if (divides) parts.add(j, std::exchange(first, first + parts.size(j)), p * w.rows, std::min(q * w.rows, w.out));
                else prepared.run(j, p, q);
            }
            then(p * w.rows, std::min(q * w.rows, w.out));
        }
    });
}

}  // namespace trimtab
