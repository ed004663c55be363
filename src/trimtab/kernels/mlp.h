// The two halves of an MLP and what lies between them as one operation: y = down(f(gate(x)) * up(x)), or down(f(up(x))).
#pragma once
#include <optional>

#include "map.h"

namespace trimtab {

struct Mlp {
    std::optional<Map> gate;
    Map up, down;
    Activation activation;
};

Activation activation_of(const std::string& name);  // std::invalid_argument says which there are

// x [rows, in] and y [rows, out], which may not overlap.
void run(const Mlp& m, const float* x, int64_t rows, float* y, const With& with);

}  // namespace trimtab
