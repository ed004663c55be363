// What Python sees: the kernels there are, what the processor can run, linear maps and decoders.
#include "bandwidth.h"
#include "bind.h"
#include "mlp.h"

#include <nanobind/stl/optional.h>
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

namespace {

struct BoundGate {
    Gate gate;
    BoundGate(const std::string& of, int64_t count, float threshold, const std::vector<float>& scale, int64_t group, int64_t pool)
        : gate{source_of(of), count, threshold, scale, {}, group, pool} {
        if (count < 0 || std::isnan(threshold)) throw std::invalid_argument("a gate has a threshold, or keeps 1 input or more");
        if (group < 1 || pool < 1 || ((group > 1 || pool > 1) && gate.of != Source::router))
            throw std::invalid_argument("the scores of a router alone are of several inputs, or several");
    }
    void run(In x, In scored, Out y) const {
        const int64_t n = int64_t(x.shape(1));
        if (x.shape(0) != scored.shape(0) || n % gate.group || gate.scores(n) != int64_t(scored.shape(1)) || x.shape(0) != y.shape(0) ||
            x.shape(1) != y.shape(1) || (!gate.scale.empty() && gate.scale.size() != x.shape(1)))
            throw std::invalid_argument("x and y are [batch, inputs of the gate], what is scored is as wide as they, or of a router as its scores are");
        pass(gate, x.data(), scored.data(), int64_t(x.shape(0)), int64_t(x.shape(1)), y.data(), {Type::f32, 1, table().ops});
    }
};

// An MLP of maps that live as long as it does.
struct BoundMlp {
    nb::object gate, up, down;
    Mlp mlp;

    BoundMlp(nb::object g, nb::object u, nb::object d, const std::string& activation, const std::vector<std::optional<BoundGate>>& gates)
        : gate(g), up(u), down(d) {
        auto map = [](nb::object o) { return Map::of(nb::cast<const Bound&>(o).linear); };
        if (!g.is_none()) mlp.gate = map(g);
        mlp.up = map(u);
        mlp.down = map(d);
        mlp.activation = activation_of(activation);
        if (mlp.gate && (mlp.gate->in != mlp.up.in || mlp.gate->out != mlp.up.out))
            throw std::invalid_argument("gate and up must be of one shape");
        const auto gated = [](Map& m, const std::optional<BoundGate>& of, bool last) {
            if (!of) return;
            if (of->gate.of == Source::router) throw std::invalid_argument("an MLP alone runs no gate of a router; a decoder does");
            if (of->gate.of == Source::hidden && !last) throw std::invalid_argument("a gate of hidden neurons is for what an MLP ends in");
            if (!of->gate.scale.empty() && int64_t(of->gate.scale.size()) != m.in)
                throw std::invalid_argument("a gate of " + std::to_string(of->gate.scale.size()) + " inputs, the map has " + std::to_string(m.in));
            m.terms[0].gate = of->gate;
        };
        if (mlp.gate) gated(*mlp.gate, gates.at(0), false);
        gated(mlp.up, gates.at(1), false);
        gated(mlp.down, gates.at(2), true);
        if (mlp.down.told() && !mlp.gate) throw std::invalid_argument("the gate of the MLP is scored, and it has none");
        if (mlp.down.in != mlp.up.out)
            throw std::invalid_argument("down takes " + std::to_string(mlp.down.in) + " features, up gives " + std::to_string(mlp.up.out));
        for (const Map* m : {&mlp.up, &mlp.down, mlp.gate ? &*mlp.gate : &mlp.up})
            if (!m->alone()->best(Type::f32, 1)) throw std::invalid_argument("no kernel here runs the layout of a map of this MLP");
    }

    void run(In x, Out y, int threads, const std::string& narrowest) const {
        if (int64_t(x.shape(1)) != mlp.up.in || y.shape(0) != x.shape(0) || int64_t(y.shape(1)) != mlp.down.out)
            throw std::invalid_argument("x must be [batch, " + std::to_string(mlp.up.in) + "] and y [batch, " + std::to_string(mlp.down.out) + "]");
        const With with{activation(narrowest), checked_threads(threads), table().ops};
        const float* from = x.data();
        nb::gil_scoped_release free;
        trimtab::run(mlp, from, int64_t(x.shape(0)), y.data(), with);
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
    m.def("peak_flops", [](const std::string& type, int threads, int repeats, const std::string& isa) {
        return peak_flops(activation(type), checked_threads(threads), repeats, isa);
    }, "type"_a, "threads"_a, "repeats"_a, "isa"_a = "", nb::call_guard<nb::gil_scoped_release>(),
          "Operations a second (a multiplication and its addition are two) with x of this type, nothing read from memory: the best try.");
    nb::class_<Bound>(m, "Linear")
        .def(nb::init<const std::string&, const std::string&, int64_t, int64_t, int, int, int, int, int64_t, const std::string&, int, float, Bytes, Bytes,
                      Bytes, Bytes, Bytes, Bytes, Bytes, Bytes, Bytes, Bytes, Bytes>(),
             "format"_a, "type"_a, "out"_a, "in"_a, "rows"_a, "cols"_a, "n"_a, "m"_a, "group"_a, "scale_type"_a, "act_bits"_a, "act_scale"_a, "values"_a, "bits"_a,
             "columns"_a, "pointers"_a, "windows"_a, "scales"_a, "zeros"_a, "table"_a,
             "book"_a, "residual"_a, "residual_book"_a)
        .def("kernels", [](const Bound& l, const std::string& narrowest) {
            std::vector<std::string> names;
            for (const Kernel* k : l.linear.kernels(activation(narrowest))) names.emplace_back(k->name);
            return names;
        }, "narrowest"_a, "Kernels that can run it here, best last; x may be rounded to `narrowest`.")
        .def("best", [](const Bound& l, const std::string& narrowest, int64_t batch) {
            const Kernel* k = l.linear.best(activation(narrowest), batch);
            return std::string(k ? k->name : "");
        }, "narrowest"_a, "batch"_a, "The one for so many rows of x; empty if there is none.")
        .def("run", &Bound::run, "x"_a, "y"_a, "threads"_a, "kernel"_a = "", "narrowest"_a = "f32",
             "y = x W^T; `kernel` by name, or the best one here that rounds x to no less than `narrowest`.");
    nb::class_<BoundGate>(m, "Gate")
        .def(nb::init<const std::string&, int64_t, float, const std::vector<float>&, int64_t, int64_t>(), "of"_a, "count"_a, "threshold"_a, "scale"_a,
             "group"_a, "pool"_a)
        .def("run", &BoundGate::run, "x"_a, "scored"_a, "y"_a, "y = x where what is scored passes, and 0 elsewhere.");
    nb::class_<BoundMlp>(m, "Mlp")
        .def(nb::init<nb::object, nb::object, nb::object, const std::string&, const std::vector<std::optional<BoundGate>>&>(), "gate"_a.none(), "up"_a,
             "down"_a, "activation"_a, "gates"_a)
        .def("run", &BoundMlp::run, "x"_a, "y"_a, "threads"_a, "narrowest"_a = "f32", "y = down(f(gate(x)) * up(x)), or down(f(up(x))) without a gate.");
    bind_decoder(m);
}
