// What Python sees: the kernels there are, what the processor can run, and one linear map at a time.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "kernel.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace trimtab;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using In = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::vector<const Kernel*> all() {
    std::vector<const Kernel*> found;
    for (const Table& t : {portable_kernels(),
#if defined(__x86_64__)
                           avx2_kernels(), avx512_kernels(), avx512bf16_kernels(),
#endif
         })
        for (int64_t i = 0; i < t.count; ++i) found.push_back(t.first + i);
    return found;
}

[[noreturn]] void bad(const std::string& what) { throw nb::value_error(what.c_str()); }

// A linear map in one format. The buffers are checked here, once, so that no kernel has to: every index is inside, every
// count is the sum of its parts. They are kept alive, not copied.
class Linear {
public:
    Linear(const std::string& format, const std::string& type, int64_t out, int64_t in, int rows, int cols, int n, int m,
           Bytes values, Bytes bits, Bytes columns, Bytes pointers)
        : format_(format), values_(values), bits_(bits) {
        if (out < 1 || in < 1 || out > INT32_MAX || in > INT32_MAX) bad("a linear map needs 1 to 2^31 - 1 outputs and inputs");
        if (type != "f32" && type != "bf16") bad("unknown type " + type + "; there are f32 and bf16");
        w_ = {out, in, rows, cols, n, m, type == "f32" ? Type::f32 : Type::bf16, (const std::byte*)values.data(),
              (const std::byte*)bits.data(), nullptr, nullptr};
        if (rows < 1 || rows > 1024 || cols < 1 || cols > in) bad("a panel is 1 to 1024 outputs high and at most as wide as the matrix");
        const int64_t item = w_.type == Type::f32 ? 4 : 2;
        const int64_t step = w_.type == Type::bf16 ? 2 : 1, wide = (cols + step - 1) / step * step;
        const int64_t have = int64_t(values.size());
        auto want = [&](int64_t bytes, const char* what) {
            if (have != bytes) bad(format + ": " + std::to_string(bytes) + " bytes of " + what + " expected, " + std::to_string(have) + " given");
        };
        if (format == "dense") {
            if (cols != in) bad("dense: a panel is as wide as the matrix");
            want(w_.panels() * rows * wide * item, "values");
        } else if (format == "bsr") {
            copy(pointers, pointers_, w_.panels() + 1, "pointers");
            if (pointers_.front() != 0) bad("bsr: the first panel does not begin at block 0");
            for (size_t i = 1; i < pointers_.size(); ++i)
                if (pointers_[i] < pointers_[i - 1]) bad("bsr: pointers fall");
            const int64_t blocks = pointers_.back();
            if (in % cols) bad("bsr: the blocks do not divide the inputs");
            if (blocks > w_.panels() * (in / cols)) bad("bsr: more blocks than places");
            copy(columns, columns_, blocks, "columns");
            for (int32_t c : columns_)
                if (c < 0 || c >= in / cols) bad("bsr: a block lies outside the matrix");
            want(blocks * rows * wide * item, "values");
            w_.columns = columns_.data();
        } else if (format == "bitmask") {
            if (rows != PANEL) bad("bitmask: panels are 32 outputs high");
            if (int64_t(bits.size()) != w_.panels() * in * 4) bad("bitmask: the bits do not cover the matrix");
            pointers_.assign(1, 0);
            for (int64_t p = 0; p < w_.panels(); ++p) {
                int64_t kept = 0;
                for (int64_t i = 0; i < in; ++i) {
                    uint32_t mask;
                    std::memcpy(&mask, w_.bits + (p * in + i) * 4, 4);
                    kept += std::popcount(mask);
                }
                pointers_.push_back(pointers_.back() + kept);
            }
            if (have < pointers_.back() * item + SLACK) bad("bitmask: fewer values than bits, or no slack behind them");
        } else if (format == "nm") {
            if (m < 2 || n < 1 || n > m || in % m) bad("nm: want 0 < n <= m, and m to divide the inputs");
            if (rows != PANEL) bad("nm: panels are 32 outputs high");
            const int64_t stored = w_.panels() * PANEL * (in / m) * n;
            want(stored * item, "values");
            if (m != 4) bad("nm: only groups of 4 have a kernel");
            if (int64_t(bits.size()) != stored / 4) bad("nm: two bits a value expected");
        } else {
            bad("unknown format " + format + "; there are dense, bsr, bitmask and nm");
        }
        if (format == "bsr" || format == "bitmask") w_.pointers = pointers_.data();
    }

    // Kernels that can run this map here, best last; those that round x come only where that loses nothing (`narrow`).
    std::vector<const Kernel*> kernels(bool narrow) const {
        std::vector<const Kernel*> found;
        for (const Kernel* k : all())
            if (k->format == format_ && k->type == w_.type && has(k->isa) && k->takes(w_) && (narrow || k->activation == Type::f32)) found.push_back(k);
        return found;
    }

    void run(In x, Out y, int threads, const std::string& name, bool narrow) const {
        const Kernel* kernel = nullptr;
        for (const Kernel* k : kernels(narrow || !name.empty()))
            if (name.empty() || name == k->name) kernel = k;
        if (!kernel) bad("no kernel " + (name.empty() ? "for this shape" : name) + " here");
        const int64_t batch = int64_t(x.shape(0));
        if (int64_t(x.shape(1)) != w_.in || int64_t(y.shape(0)) != batch || int64_t(y.shape(1)) != w_.out)
            bad("x must be [batch, " + std::to_string(w_.in) + "] and y [batch, " + std::to_string(w_.out) + "]");
        if (threads < 1 || threads > 1024) bad("threads must be 1 to 1024");
        if (!batch) return;
        const float* from = x.data();
        float* to = y.data();
        nb::gil_scoped_release free;
        parallel(w_.panels(), threads, [&](int64_t begin, int64_t end, int) {
            thread_local std::vector<float> scratch;
            scratch.resize(size_t(kernel->scratch(w_, batch)));
            kernel->run(w_, from, batch, to, begin, end, scratch.data());
        });
    }

private:
    template <class T>
    void copy(const Bytes& from, std::vector<T>& to, int64_t count, const char* what) {
        if (int64_t(from.size()) != count * int64_t(sizeof(T)))
            bad(format_ + ": " + std::to_string(count) + " " + what + " expected, " + std::to_string(from.size() / sizeof(T)) + " given");
        to.resize(size_t(count));
        if (count) std::memcpy(to.data(), from.data(), from.size());
    }

    std::string format_;
    Bytes values_, bits_;
    std::vector<int32_t> columns_;
    std::vector<int64_t> pointers_;
    Weights w_;
};

}  // namespace

NB_MODULE(_trimtab_kernels, m) {
    m.attr("VERSION") = TRIMTAB_VERSION;
    m.attr("PANEL") = PANEL;
    m.attr("SLACK") = SLACK;
    m.def("isas", [] {
        std::vector<std::string> found;
        for (Isa i : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::neon})
            if (has(i)) found.emplace_back(isa_name(i));
        return found;
    }, "Instruction sets this processor has, best last.");
    m.def("kernels", [] {
        nb::list found;
        for (const Kernel* k : all()) {
            nb::dict d;
            d["name"] = k->name;
            d["op"] = k->op;
            d["format"] = k->format;
            d["type"] = k->type == Type::f32 ? "f32" : "bf16";
            d["activation"] = k->activation == Type::f32 ? "f32" : "bf16";
            d["isa"] = isa_name(k->isa);
            d["here"] = has(k->isa);
            found.append(d);
        }
        return found;
    }, "Every kernel that was built, and whether it runs here.");
    nb::class_<Linear>(m, "Linear")
        .def(nb::init<const std::string&, const std::string&, int64_t, int64_t, int, int, int, int, Bytes, Bytes, Bytes, Bytes>(),
             "format"_a, "type"_a, "out"_a, "in"_a, "rows"_a, "cols"_a, "n"_a, "m"_a, "values"_a, "bits"_a, "columns"_a, "pointers"_a)
        .def_prop_ro("kernels", [](const Linear& l) {
            std::vector<std::string> names;
            for (const Kernel* k : l.kernels(true)) names.emplace_back(k->name);
            return names;
        })
        .def("run", &Linear::run, "x"_a, "y"_a, "threads"_a, "kernel"_a = "", "narrow"_a = false,
             "y = x W^T; `kernel` by name, or the best one here. `narrow`: x holds bfloat16 values.");
}
