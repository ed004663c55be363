// What memory gives: the bound of everything that reads its weights once.
#pragma once
#include <cstdint>

namespace trimtab {

// Bytes a second that `threads` threads read from `bytes` of memory: the best of 1, 2, 4 and 8 streams a thread, of
// small and huge pages, and of `repeats` tries each. Throws std::bad_alloc.
double read_bandwidth(int64_t bytes, int threads, int repeats);

}  // namespace trimtab
