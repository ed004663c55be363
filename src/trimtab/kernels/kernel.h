// What every kernel is: one struct. A kernel computes some panels of y = x W^T on one thread; who calls it divides them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace trimtab {

// Outputs that lie side by side in a panel. Formats with blocks have panels as high as their blocks.
constexpr int PANEL = 32;
// Bytes that may be read, and are thrown away, behind the last value of a buffer that is expanded in registers.
constexpr int SLACK = 64;

enum class Isa { portable, avx2, avx512, avx512bf16, neon };
enum class Type { f32, bf16 };

// One linear map [out, in] as its format lays it out; see layouts.py for the layouts. Pointers need no alignment.
struct Weights {
    int64_t out, in;
    int rows, cols;            // of a block; a dense panel is one block: rows = PANEL, cols = in
    int n, m;                  // n:m
    Type type;                 // of the values
    const std::byte* values;
    const std::byte* bits;     // bitmask: one bit a place; n:m: two bits a value
    const int32_t* columns;    // blocks: block column of each
    const int64_t* pointers;   // where a panel's blocks (or values) begin, [panels + 1]
    int64_t panels() const { return (out + rows - 1) / rows; }
};

// Panels begin .. end of y [batch, out] = x [batch, in] W^T. `scratch` holds `Kernel::scratch` floats and is this thread's own.
using Run = void (*)(const Weights& w, const float* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch);

struct Kernel {
    const char* name;          // <op>_<activation>_<format>-<type>_<isa>: names.py has the grammar
    const char* op;
    const char* format;
    Type type;                 // of the weights
    Type activation;           // what x is rounded to before it is multiplied
    Isa isa;
    bool (*takes)(const Weights&);
    int64_t (*scratch)(const Weights&, int64_t batch);
    Run run;
};

struct Table { const Kernel* first; int64_t count; };
// One a translation unit; the flags it was compiled with are its instruction set.
Table portable_kernels();
Table avx2_kernels();
Table avx512_kernels();
Table avx512bf16_kernels();

bool has(Isa isa);             // whether this processor (and the operating system) can run it
const char* isa_name(Isa isa);

}  // namespace trimtab
