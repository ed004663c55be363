#include "mlp.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

#include "pool.h"

namespace trimtab {
namespace {

// Rows that go through all of it before the next ones do: what lies between the maps is still in the cache when it is read.
constexpr int64_t TOGETHER = 24;
// Every thread reads all weights for every so many rows, which pays where they stay in the last-level cache.
constexpr int64_t CACHED = 16 << 20;

void whole(const Mlp& m, const float* x, int64_t rows, float* y, const With& with) {
    thread_local std::vector<float> gates, ups, passed;
    const int64_t width = m.up.out;
    float *up = sized(ups, rows * width), *gate = m.gate ? sized(gates, rows * width) : nullptr;
    const Gate* told = m.down.told();
    const bool hidden = told && told->of == Source::hidden;
    const auto activated = [&](int64_t r, int64_t begin, int64_t end) {
        float *g = gate ? gate + r * width : nullptr, *u = up + r * width;
        if (!hidden) return with.ops->activate(m.activation, g ? g + begin : nullptr, u + begin, end - begin);
        with.ops->activate(m.activation, nullptr, g + begin, end - begin);
        for (int64_t i = begin; i < end; ++i) u[i] *= g[i];
    };
    std::vector<Target> targets{{&m.up, up}};
    if (gate) targets.push_back({&*m.gate, gate});
    std::vector<Job> jobs;
    for (const Target& t : targets)
        if (const Linear* l = t.map->alone()) jobs.push_back({&l->weights(), l->best(with.narrowest, rows), t.y});
    const std::optional<Gate>& read = m.up.terms[0].gate;
    if (jobs.size() == targets.size() && side_by_side(jobs) && (!gate || m.gate->terms[0].gate == read)) {
        const float* from = x;
        if (read) pass(*read, x, x, rows, m.up.in, sized(passed, rows * m.up.in), with), from = passed.data();
        run(jobs, from, rows, with.threads, [&](int64_t begin, int64_t end) {
            for (int64_t r = 0; r < rows; ++r) activated(r, begin, end);
        });
    } else {
        apply(targets, x, rows, with);
        each_row(rows, 2 * width, with.threads, [&](int64_t r) { activated(r, 0, width); });
    }
    if (told) pass(*told, up, hidden ? gate : routed(*told, x, rows, with), rows, width, up, with);
    apply(std::array<Target, 1>{{{&m.down, y}}}, up, rows, with);
}

}  // namespace

Activation activation_of(const std::string& name) {
    static const std::pair<const char*, Activation> known[] = {
        {"silu", Activation::silu}, {"gelu", Activation::gelu}, {"gelu_tanh", Activation::gelu_tanh}, {"relu", Activation::relu}};
    for (const auto& [word, a] : known)
        if (name == word) return a;
    throw std::invalid_argument("unknown activation " + name + "; there are silu, gelu, gelu_tanh and relu");
}

void run(const Mlp& m, const float* x, int64_t rows, float* y, const With& with) {
    const int64_t weights = (m.gate ? bytes(*m.gate) : 0) + bytes(m.up) + bytes(m.down);
    if (weights > CACHED || rows < with.threads * TOGETHER) return whole(m, x, rows, y, with);
    parallel(rows, with.threads, [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; r += TOGETHER)
            whole(m, x + r * m.up.in, std::min(TOGETHER, end - r), y + r * m.down.out, {with.narrowest, 1, with.ops});
    });
}

}  // namespace trimtab
