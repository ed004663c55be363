// Threads that wait without spinning for long, so that they do not stand in the way of torch's own.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace trimtab {

// Runs work(begin, end, thread) over [0, count) in `threads` parts of about equal size; the calling thread takes part.
// Calls from several threads take turns.
void parallel(int64_t count, int threads, const std::function<void(int64_t, int64_t, int)>& work);

// Below this much work a second thread costs more than it saves.
constexpr int64_t SMALL = 1 << 16;

// f(row) for every row, each about `width` steps of work.
template <class F>
inline void each_row(int64_t rows, int64_t width, int threads, const F& f) {
    auto some = [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) f(r);
    };
    parallel(rows, rows * width < SMALL ? 1 : threads, std::ref(some));
}

// Memory that grows and stays.
inline float* sized(std::vector<float>& v, int64_t n) {
    if (int64_t(v.size()) < n) v.resize(size_t(n));
    return v.data();
}

}  // namespace trimtab
