#include "pool.h"

#include <unistd.h>

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace trimtab {
namespace {

constexpr int SPIN = 4000;  // tries before a waiting thread goes to sleep: tens of microseconds, the gap between two layers

void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

int here() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// A thread that was woken on the processor of the one that woke it moves to another: the two would take turns there for
// milliseconds. It is not bound to any.
void step_aside(int from) {
#if defined(__linux__)
    cpu_set_t all;
    if (here() != from || sched_getaffinity(0, sizeof all, &all) || CPU_COUNT(&all) < 2) return;
    cpu_set_t others = all;
    CPU_CLR(from, &others);
    if (!sched_setaffinity(0, sizeof others, &others)) sched_setaffinity(0, sizeof all, &all);
#else
    (void)from;
#endif
}

class Pool {
public:
    void run(int64_t count, int threads, const std::function<void(int64_t, int64_t, int)>& work) {
        std::lock_guard turn(turn_);
        grow(threads - 1);
        work_ = &work;
        count_ = count;
        parts_ = threads;
        caller_ = here();
        left_.store(int(workers_.size()), std::memory_order_relaxed);
        {
            std::lock_guard lock(mutex_);
            round_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        part(0);
        for (int tries = 0; left_.load(std::memory_order_acquire); ++tries)
            tries > SPIN ? std::this_thread::yield() : breathe();
        if (failed_) std::rethrow_exception(std::exchange(failed_, nullptr));
    }

private:
    void grow(int wanted) {
        while (int(workers_.size()) < wanted) {
            const int id = int(workers_.size()) + 1;
            workers_.emplace_back([this, id, seen = round_.load()] { serve(id, seen); });
            workers_.back().detach();  // they end with the process, which never joins them
        }
    }

    void serve(int id, uint64_t seen) {
        for (;;) {
            int tries = 0;
            while (round_.load(std::memory_order_acquire) == seen && tries < SPIN) ++tries, breathe();
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return round_.load(std::memory_order_relaxed) != seen; });
                lock.unlock();
                step_aside(caller_);
            }
            seen = round_.load(std::memory_order_acquire);
            if (id < parts_) part(id);
            left_.fetch_sub(1, std::memory_order_release);
        }
    }

    void part(int id) {
        const int64_t begin = count_ * id / parts_, end = count_ * (id + 1) / parts_;
        if (begin >= end) return;
        try {
            (*work_)(begin, end, id);
        } catch (...) {  // no memory: who called hears of it when no thread uses `work_` any more
            std::lock_guard lock(mutex_);
            failed_ = std::current_exception();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> left_{0};
    const std::function<void(int64_t, int64_t, int)>* work_ = nullptr;
    std::exception_ptr failed_;
    int64_t count_ = 0;
    int parts_ = 1, caller_ = -1;
};

}  // namespace

void parallel(int64_t count, int threads, const std::function<void(int64_t, int64_t, int)>& work) {
    if (threads <= 1 || count <= 1) {
        work(0, count, 0);
        return;
    }
    // Never destroyed: its threads may still sleep in it. After a fork the child, which has none of them, gets its own.
    static Pool* pool = new Pool;
    static pid_t owner = getpid();
    static std::mutex forked;
    {
        std::lock_guard lock(forked);
        if (owner != getpid()) {
            pool = new Pool;
            owner = getpid();
        }
    }
    pool->run(count, threads, work);
}

}  // namespace trimtab
