// A linear map whose buffers were checked, and the calls that run it.
#pragma once
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "kernel.h"

namespace trimtab {

struct Layout {
    std::string format;        // dense, columns, bsr, bitmask, sell, nm, book
    std::string type;          // f32, bf16, i8, i4, i3, i2, t, v, l8, l4, l3, l2, l1
    int64_t out, in;
    int rows, cols, n, m;      // of a book the outputs of a vector, 1, and the bits of its indices
    int64_t group;
    std::string scale_type;    // f32, f16; empty where there are no codes
    int act_bits = 0;          // codes: what x is rounded to, whoever runs it; see Weights
    float act_scale = 0;
};

struct Buffers { std::span<const std::byte> values, bits, columns, pointers, windows, scales, zeros, table, book, residual, residual_book; };

// The buffers are checked here, once, so that no kernel has to: every index is inside, every count is the sum of its parts.
// They are not copied, the index arrays of blocks excepted, and must outlive the map, which stays where it is. Throws std::invalid_argument.
class Linear {
public:
    Linear(const Layout& layout, const Buffers& buffers);
    Linear(const Linear&) = delete;
    const Weights& weights() const { return w_; }
    int64_t bytes() const { return bytes_; }  // of all buffers
    // Kernels that can run it here, best last. `narrowest`: x may be rounded to this type (f32: not at all).
    const std::vector<const Kernel*>& kernels(Type narrowest) const;
    // The one for this many rows of x; null if there is none.
    const Kernel* best(Type narrowest, int64_t batch) const;

private:
    void books(const Layout& layout, const Buffers& buffers);

    std::vector<const Kernel*> kernels_[3];  // x as it is, or at worst in bf16, or at worst in i8
    std::vector<int32_t> columns_;
    std::vector<int64_t> pointers_;
    std::vector<float> floats_;
    std::vector<uint8_t> bytes_of_books_;
    Weights w_;
    int64_t bytes_;
};

struct Job { const Weights* weights; const Kernel* kernel; float* y; };
// Maps of the same x [batch, in] in one go: x is made ready once for all that want it alike.
void run(std::span<const Job> jobs, const float* x, int64_t batch, int threads);
// The same with maps whose panels are equally high and many (`side_by_side`): `then` gets outputs begin .. end as soon as all of
// them have given theirs, on the thread that computed them.
using Then = std::function<void(int64_t begin, int64_t end)>;
bool side_by_side(std::span<const Job> jobs);
void run(std::span<const Job> jobs, const float* x, int64_t batch, int threads, const Then& then);

std::vector<const Kernel*> all_kernels();
// Of the instruction sets this processor has: the best, or the one of this name (std::invalid_argument if there is none).
const Table& table(const std::string& isa = "");

}  // namespace trimtab
