// Threads that wait without spinning for long, so that they do not stand in the way of torch's own.
#pragma once
#include <cstdint>
#include <functional>

namespace trimtab {

// Runs work(begin, end, thread) over [0, count) in `threads` parts of about equal size; the calling thread takes part.
// Calls from several threads take turns.
void parallel(int64_t count, int threads, const std::function<void(int64_t, int64_t, int)>& work);

}  // namespace trimtab
