// What Python sees: the kernels there are, what the processor can run, and linear maps.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bandwidth.h"
#include "linear.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace trimtab;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using In = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::span<const std::byte> bytes(const Bytes& b) { return {reinterpret_cast<const std::byte*>(b.data()), b.size()}; }

Type activation(const std::string& name) {
    for (Type t : {Type::f32, Type::bf16, Type::i8})
        if (name == type_name(t)) return t;
    throw std::invalid_argument("x is multiplied as f32, bf16 or i8, not " + name);
}

// A checked map with the memory it lies in, kept alive and not copied.
struct Bound {
    Bytes values, bits, columns, pointers, scales, zeros;
    Linear linear;
    Bound(const std::string& format, const std::string& type, int64_t out, int64_t in, int rows, int cols, int n, int m, int64_t group,
          const std::string& scale_type, Bytes v, Bytes b, Bytes c, Bytes p, Bytes s, Bytes z)
        : values(v), bits(b), columns(c), pointers(p), scales(s), zeros(z),
          linear({format, type, out, in, rows, cols, n, m, group, scale_type}, {bytes(v), bytes(b), bytes(c), bytes(p), bytes(s), bytes(z)}) {}

    void run(In x, Out y, int threads, const std::string& name, const std::string& narrowest) const {
        const int64_t batch = int64_t(x.shape(0));
        const Kernel* kernel = nullptr;
        if (name.empty()) kernel = linear.best(activation(narrowest), batch);
        else
            for (Type t : {Type::bf16, Type::i8})
                for (const Kernel* k : linear.kernels(t))
                    if (name == k->name) kernel = k;
        if (!kernel) throw std::invalid_argument("no kernel " + (name.empty() ? "for this shape" : name) + " here");
        const Weights& w = linear.weights();
        if (int64_t(x.shape(1)) != w.in || int64_t(y.shape(0)) != batch || int64_t(y.shape(1)) != w.out)
            throw std::invalid_argument("x must be [batch, " + std::to_string(w.in) + "] and y [batch, " + std::to_string(w.out) + "]");
        if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
        const Job job{&w, kernel, y.data()};
        const float* from = x.data();
        nb::gil_scoped_release free;
        trimtab::run({&job, 1}, from, batch, threads);
    }
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
        for (const Kernel* k : all_kernels()) {
            nb::dict d;
            d["name"] = k->name;
            d["op"] = k->op;
            d["format"] = k->format;
            d["type"] = type_name(k->type);
            d["activation"] = type_name(k->activation);
            d["isa"] = isa_name(k->isa);
            d["here"] = has(k->isa);
            found.append(d);
        }
        return found;
    }, "Every kernel that was built, and whether it runs here.");
    m.def("read_bandwidth", &read_bandwidth, "bytes"_a, "threads"_a, "repeats"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Bytes a second that can be read: the best of several numbers of streams, small and huge pages.");
    nb::class_<Bound>(m, "Linear")
        .def(nb::init<const std::string&, const std::string&, int64_t, int64_t, int, int, int, int, int64_t, const std::string&, Bytes, Bytes,
                      Bytes, Bytes, Bytes, Bytes>(),
             "format"_a, "type"_a, "out"_a, "in"_a, "rows"_a, "cols"_a, "n"_a, "m"_a, "group"_a, "scale_type"_a, "values"_a, "bits"_a,
             "columns"_a, "pointers"_a, "scales"_a, "zeros"_a)
        .def("kernels", [](const Bound& l, const std::string& narrowest) {
            std::vector<std::string> names;
            for (const Kernel* k : l.linear.kernels(activation(narrowest))) names.emplace_back(k->name);
            return names;
        }, "narrowest"_a, "Kernels that can run it here, best last; x may be rounded to `narrowest`.")
        .def("run", &Bound::run, "x"_a, "y"_a, "threads"_a, "kernel"_a = "", "narrowest"_a = "f32",
             "y = x W^T; `kernel` by name, or the best one here that rounds x to no less than `narrowest`.");
}
