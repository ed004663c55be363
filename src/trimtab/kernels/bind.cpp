// What Python sees: the kernels there are, what the processor can run, linear maps and decoders.
#include "bandwidth.h"
#include "bind.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

using namespace nanobind::literals;
using namespace trimtab;

void Bound::run(In x, Out y, int threads, const std::string& name, const std::string& narrowest) const {
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
    const Job job{&w, kernel, y.data()};
    checked_threads(threads);
    const float* from = x.data();
    nb::gil_scoped_release free;
    trimtab::run({&job, 1}, from, batch, threads);
}

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
    m.def("peak_flops", [](const std::string& type, int threads, int repeats, const std::string& isa) {
        return peak_flops(activation(type), checked_threads(threads), repeats, isa);
    }, "type"_a, "threads"_a, "repeats"_a, "isa"_a = "", nb::call_guard<nb::gil_scoped_release>(),
          "Operations a second (a multiplication and its addition are two) with x of this type, nothing read from memory: the best try.");
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
    bind_decoder(m);
}
