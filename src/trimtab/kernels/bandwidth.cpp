#include "bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <new>

#include "linear.h"
#include "pool.h"

namespace trimtab {
namespace {

// Sums 64-byte lines of `streams` equal parts of [from, from + lines), one line of each in turn.
uint64_t sum(const uint64_t* from, int64_t lines, int streams) {
    constexpr int64_t AHEAD = 32;  // lines
    const int64_t part = lines / streams;
    uint64_t total[8] = {};
    for (int64_t i = 0; i < part; ++i)
        for (int s = 0; s < streams; ++s) {
            const uint64_t* line = from + (s * part + i) * 8;
            __builtin_prefetch(line + AHEAD * 8);
            for (int k = 0; k < 8; ++k) total[k] += line[k];
        }
    uint64_t all = 0;
    for (uint64_t t : total) all += t;
    return all;
}

}  // namespace

double read_bandwidth(int64_t bytes, int threads, int repeats) {
    bytes = std::max<int64_t>(bytes >> 21, 1) << 21;
    double best = 0;
    for (bool huge : {false, true}) {
        void* memory = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(memory, size_t(bytes), huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
        uint64_t* from = static_cast<uint64_t*>(memory);
        const int64_t lines = bytes / 64;
        parallel(lines, threads, [&](int64_t begin, int64_t end, int) { std::fill(from + begin * 8, from + end * 8, uint64_t(1)); });
        for (int r = 0; r < repeats; ++r)
            for (int streams : {1, 2, 4, 8}) {
                std::atomic<uint64_t> total{0};
                const auto began = std::chrono::steady_clock::now();
                parallel(lines, threads, [&](int64_t begin, int64_t end, int) { total += sum(from + begin * 8, end - begin, streams); });
                const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
                if (total.load() != 0) best = std::max(best, double(bytes) / took.count());
            }
        munmap(memory, size_t(bytes));
    }
    return best;
}

double peak_flops(Type type, int threads, int repeats, const std::string& isa) {
    constexpr int64_t ROUNDS = 1 << 18;  // sums of codes stay below 2^31
    constexpr int TIMES = 8;             // some milliseconds: threads wake up in tens of microseconds
    const Multiply multiply = table(isa).multiply;
    alignas(64) float halves[256];
    std::fill(std::begin(halves), std::end(halves), 0.5f);
    double best = 0;
    for (int r = 0; r < repeats; ++r) {
        std::atomic<int64_t> done{0};
        const auto began = std::chrono::steady_clock::now();
        parallel(threads, threads, [&](int64_t begin, int64_t end, int) {
            float sum = 0;
            for (int64_t i = 0; i < (end - begin) * TIMES; ++i) done += multiply(type, ROUNDS, reinterpret_cast<const std::byte*>(halves), &sum);
        });
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        best = std::max(best, 2.0 * double(done.load()) / took.count());
    }
    return best;
}

}  // namespace trimtab
