// What the machine gives: memory is the bound of what reads its weights once, multiplications that of what meets many rows.
#pragma once
#include <cstdint>
#include <string>

#include "kernel.h"

namespace trimtab {

// Bytes a second that `threads` threads read from `bytes` of memory: the best of 1, 2, 4 and 8 streams a thread, of
// small and huge pages, and of `repeats` tries each. Throws std::bad_alloc.
double read_bandwidth(int64_t bytes, int threads, int repeats);

// Operations a second, a multiplication and its addition being two, that `threads` threads do with x of this type (f32, bf16, i8)
// while everything lies in registers and the first-level cache: the best of `repeats` tries. `isa`: empty for the best here.
double peak_flops(Type type, int threads, int repeats, const std::string& isa = "");

}  // namespace trimtab
