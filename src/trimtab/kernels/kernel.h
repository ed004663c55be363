// What every kernel is: one struct. A kernel computes some panels of y = x W^T on one thread; who calls it divides them.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace trimtab {

// Outputs that lie side by side in a panel. Formats with blocks have panels as high as their blocks.
constexpr int PANEL = 32;
// columns: a column is filled up to as many outputs, which are what threads divide where rows of x are many.
constexpr int STRIPE = 128;
// sell: outputs of a panel, entries that a step holds of each, and inputs of the window they lie in: as many as registers hold of x.
constexpr int SELL_ROWS = 16, SELL_ENTRIES = 2, SELL_WINDOW = 128;
// Bytes that may be read, and are thrown away, behind the last value of a buffer that is expanded in registers.
constexpr int SLACK = 64;

enum class Isa { portable, avx2, avx512, avx512bf16, neon };
// i8, i4, i2: codes, one group of inputs and one output sharing a scale and a zero point: weight = scale * (code - zero).
// i3: the same of three bits, which lie as two words of their lower two for 32 inputs and one of their third.
// t: ternary codes 0, 1 and 2 with the zero point 1, five a byte. v: indices into a book of vectors of outputs.
// l8: e4m3, in order of size: code 128 is its zero, 254 its largest. l4, l3, l2, l1: codes of a table, weight = scale * table[code].
enum class Type { f32, bf16, f16, i8, i4, i3, i2, t, v, l8, l4, l3, l2, l1 };
constexpr Type TYPES[] = {Type::f32, Type::bf16, Type::f16, Type::i8, Type::i4, Type::i3, Type::i2, Type::t, Type::v,
                          Type::l8, Type::l4, Type::l3, Type::l2, Type::l1};

constexpr bool by_table(Type t) { return t >= Type::l8; }
constexpr int code_bits(Type t) {
    switch (t) {
        case Type::i8: case Type::l8: return 8;
        case Type::i4: case Type::l4: return 4;
        case Type::i3: case Type::l3: return 3;
        case Type::i2: case Type::l2: return 2;
        case Type::l1: return 1;
        default: return 0;
    }
}
// Codes come in units of whole words: 32-bit words of one, and inputs it holds; 0 where there are no codes.
constexpr int unit_words(Type t) { return code_bits(t) == 3 ? 3 : 1; }
constexpr int unit_inputs(Type t) { return t == Type::t ? 20 : code_bits(t) == 3 ? 32 : code_bits(t) ? 32 / code_bits(t) : 0; }

// book: vectors of a panel, and inputs of theirs that lie together.
constexpr int BESIDE = 16, UNIT_INPUTS = 4;
// A book of 2^bits vectors, made ready: floats [2^bits, wide], wide being 4, 8 or 16, and what meets x in eight bits, vector by vector
// [2^bits, 8], or of no more than eight bits output by output [v, 64 or 256]; where there are two, the second is added to the first.
struct Book {
    int bits;
    const std::byte* index;
    const float* floats;
    const uint8_t* bytes;
    int64_t tables() const { return bits > 6 ? 256 : 64; }
};

// One linear map [out, in] as its format lays it out; see methods/format/panels.py for the layouts. Pointers need no alignment.
struct Weights {
    int64_t out, in;
    int rows, cols;            // of a block; a dense panel is one block: rows = PANEL, cols = in
    int n, m;                  // n:m
    int64_t group;             // codes: inputs that share a scale
    Type type;                 // of the values
    Type scale_type;           // f32 or f16
    const std::byte* values;
    const std::byte* bits;     // bitmask: one bit a place; n:m: which place a value has (`Places`); sell: where the window of a step begins, 32 bits each
    const int32_t* columns;    // blocks: block column of each
    const uint8_t* offsets;    // sell: the input of each entry, from the first of its window on
    const int64_t* pointers;   // where a panel's blocks (or values, or steps) begin, [panels + 1]
    const std::byte* scales;   // [panels or blocks, groups, rows]
    const uint8_t* zeros;      // as scales; null: the middle code everywhere
    float table[16];           // of a code; of l8 its first is what the numbers of e4m3 are multiplied by
    uint8_t bytes[16];         // table[code] / step + 128, rounded: what meets x in eight bits
    float step;
    int act_bits = 0;          // codes: what x is rounded to, by the row or by `act_scale` where there is one; 0: to eight bits by groups, where it may
    float act_scale = 0;
    int vector = 0;            // book: outputs of a vector; a panel has `rows` = BESIDE * vector
    int wide = 0;
    Book books[2] = {};        // the second may have no bits
    int64_t panels() const { return (out + rows - 1) / rows; }
    int64_t groups() const { return (in + group - 1) / group; }
    int64_t first(int64_t panel) const { return pointers ? pointers[panel] : panel; }  // block; a dense panel is one
};

// Of so many rows those that go by in vectors: the last of them may lack three quarters.
constexpr int64_t in_vectors(int64_t batch, int lanes) { return (batch + lanes * 3 / 4) / lanes * lanes; }

// What a kernel wants of x, made ready once for all panels; maps with equal inputs can share it. x is units of four bytes:
// one float32, two bfloat16 or four codes.
struct Input {
    Type type;                 // f32 as it is; bf16: rounded, rows filled up to pairs; i8: rounded by groups
    int64_t group;             // i8: inputs that share a scale
    int tile;                  // rows that lie side by side, unit by unit, in a full tile (see `tile_at`); 0: row after row
    int lanes = 0;             // instead of tiles: rows side by side in vectors of so many, a few vectors together, the rest row after row
    bool full = false;         // full tiles only: rows that fill none lie one after the other
    int side = 1;              // units of a row that stay together in a tile
    int fill = 64;             // i8: zeros behind the last input, up to a multiple of so many
    int bits = 0;              // i8: as `Weights::act_bits`
    float scale = 0;
    bool operator==(const Input&) const = default;
    int64_t units(int64_t in) const { return type == Type::f32 ? in : type == Type::bf16 ? (in + 1) / 2 : (in + fill - 1) / fill * fill / 4; }
    int64_t bytes(int64_t in, int64_t batch) const {  // 0: x itself is read
        if (lanes) return in_vectors(batch, lanes) ? std::max(batch, in_vectors(batch, lanes)) * in * 4 : 0;
        if (type == Type::f32 && (!tile || batch == 1 || (full && batch < tile))) return 0;
        return batch * (units(in) * 4 + (type == Type::i8 ? (in + group - 1) / group * 8 : 0));
    }
};

// Rows begin .. end of x [batch, in] are made ready.
using Prepare = void (*)(const Input&, const float* x, int64_t in, int64_t batch, int64_t begin, int64_t end, std::byte* to);
// Panels begin .. end of y [batch, out]. `scratch` holds `Kernel::scratch` floats from a cache line on and is
// this thread's own.
using Run = void (*)(const Weights& w, const void* x, int64_t batch, float* y, int64_t begin, int64_t end, float* scratch);

// Inputs from .. to of outputs begin .. end, which are whole panels.
struct Region { int64_t from, to, begin, end; };
// Of a few rows, what the inputs of a region that x meets add up to: `sums` [batch, outputs filled up to a panel], its outputs alone.
using Part = void (*)(const Weights& w, const void* x, int64_t batch, const Region& region, float* sums, float* scratch);
// Rows of x up to which a kernel that has it goes over regions, and not panels.
constexpr int64_t FEW = 4;

struct Kernel {
    const char* name;          // <op>_<activation>_<format>-<type>_<isa>: names.py has the grammar
    const char* op;
    const char* format;
    Type type;                 // of the weights
    Type activation;           // what x is rounded to before it is multiplied
    Isa isa;
    bool (*takes)(const Weights&);
    Input (*input)(const Weights&);
    int64_t (*scratch)(const Weights&, int64_t batch);
    Run run;
    Prepare prepare;
    Part part = nullptr;
    int64_t until = INT64_MAX; // rows of x up to which it is chosen before the ones above it

    bool divides(int64_t batch) const { return part && batch <= FEW; }
    Input wants(const Weights& w) const {
        Input i = input(w);
        if (i.type == Type::i8) i.bits = w.act_bits, i.scale = w.act_scale;
        return i;
    }
};

struct Ops;                    // ops.h
// Rounds of nothing but multiplications, x being of `type` (f32, bf16 or i8), with what lies in the 1024 bytes from `from`; how many
// that were. `to` is there so that they are not left out.
using Multiply = int64_t (*)(Type type, int64_t rounds, const std::byte* from, float* to);
struct Table { const Kernel* first; int64_t count; const Ops* ops; Multiply multiply; };
// One a translation unit; the flags it was compiled with are its instruction set.
Table portable_kernels();
Table avx2_kernels();
Table avx512_kernels();
Table avx512bf16_kernels();
Table neon_kernels();

bool has(Isa isa);             // whether this processor (and the operating system) can run it
const char* isa_name(Isa isa);
const char* type_name(Type type);

}  // namespace trimtab
