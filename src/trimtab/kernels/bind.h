// What the Python module is made of.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "linear.h"

namespace trimtab {

namespace nb = nanobind;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using In = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

inline std::span<const std::byte> bytes(const Bytes& b) { return {reinterpret_cast<const std::byte*>(b.data()), b.size()}; }

inline Type activation(const std::string& name) {
    for (Type t : {Type::f32, Type::bf16, Type::i8})
        if (name == type_name(t)) return t;
    throw std::invalid_argument("x is multiplied as f32, bf16 or i8, not " + name);
}

inline int checked_threads(int threads) {
    if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be 1 to 1024");
    return threads;
}

// A checked map with the memory it lies in, kept alive and not copied.
struct Bound {
    Bytes values, bits, columns, pointers, windows, scales, zeros, table, book, residual, residual_book;
    Linear linear;
    Bound(const std::string& format, const std::string& type, int64_t out, int64_t in, int rows, int cols, int n, int m, int64_t group,
          const std::string& scale_type, int act_bits, float act_scale, Bytes v, Bytes b, Bytes c, Bytes p, Bytes w, Bytes s, Bytes z, Bytes t,
          Bytes k, Bytes r, Bytes q)
        : values(v), bits(b), columns(c), pointers(p), windows(w), scales(s), zeros(z), table(t), book(k), residual(r), residual_book(q),
          linear({format, type, out, in, rows, cols, n, m, group, scale_type, act_bits, act_scale},
                 {bytes(v), bytes(b), bytes(c), bytes(p), bytes(w), bytes(s), bytes(z), bytes(t), bytes(k), bytes(r), bytes(q)}) {}

    void run(In x, Out y, int threads, const std::string& name, const std::string& narrowest) const;
};

void bind_decoder(nb::module_& m);

}  // namespace trimtab
