#include "map.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <stdexcept>

#include "pool.h"

namespace trimtab {
namespace {

// Memory of one call that the next one uses again.
class Between {
public:
    float* next(int64_t n) {
        if (used_ == held_.size()) held_.emplace_back();
        return sized(held_[used_++], n);
    }
    void free() { used_ = 0; }

private:
    std::deque<std::vector<float>> held_;
    size_t used_ = 0;
};

struct Work {
    const Term* term;
    const float* x;  // as its first map reads it
    float* y;        // what that gives
    const Target* target;
};

bool reads_alike(const Term& a, const Term& b) { return a.inside == b.inside && a.taken == b.taken && a.gate == b.gate; }

const float* ready(const Term& t, const float* x, int64_t in, int64_t rows, const With& with, Between& between) {
    if (t.gate && t.gate->of == Source::input) {  // others are for who runs the sublayer
        float* passed = between.next(rows * in);
        pass(*t.gate, x, x, rows, in, passed, with);
        x = passed;
    }
    if (!t.taken.empty()) {
        const int64_t n = int64_t(t.taken.size());
        float* some = between.next(rows * n);
        each_row(rows, n, with.threads, [&](int64_t r) {
            for (int64_t i = 0; i < n; ++i) some[r * n + i] = x[r * in + t.taken[size_t(i)]];
        });
        x = some;
    }
    if (!t.inside) return x;
    const int64_t n = t.inside->size;
    float* turned = between.next(rows * n);
    each_row(rows, n * t.inside->cost(), with.threads, [&](int64_t r) { with.ops->turn(*t.inside, x + r * n, turned + r * n); });
    return turned;
}

void shift(const std::vector<float>& bias, float* y, int64_t rows, int64_t width, const With& with) {
    if (!bias.empty()) each_row(rows, width, with.threads, [&](int64_t r) { with.ops->add(y + r * width, bias.data(), width); });
}

}  // namespace

void pass(const Gate& g, const float* x, const float* scored, int64_t rows, int64_t n, float* y, const With& with) {
    const float* scale = g.scale.empty() ? nullptr : g.scale.data();
    const bool by_router = g.of == Source::router;
    const int64_t units = n / g.group, wide = g.scores(n);
    each_row(rows, g.count ? 8 * std::max(n, wide) : std::max(n, wide), with.threads, [&](int64_t r) {
        const float *from = x + r * n, *its = scored + r * wide;
        float* to = y + r * n;
        if (!g.count && !by_router) return with.ops->pass(from, its, scale, g.threshold, n, to);
        if (g.count >= units) {
            if (to != from) std::copy_n(from, n, to);
            return;
        }
        thread_local std::vector<float> scores, order;
        sized(scores, units);
        for (int64_t i = 0; i < units; ++i) {
            float s = by_router ? its[i * g.pool] : std::abs(its[i]) * (scale ? scale[i] : 1.0f);
            for (int64_t j = 1; j < g.pool && s == s; ++j)
                if (const float other = its[i * g.pool + j]; !(other <= s)) s = other;  // what is no number too
            scores[size_t(i)] = s;
        }
        float least = g.threshold;
        int64_t room = 0;
        if (g.count) {
            for (int64_t i = 0; i < units; ++i)
                if (scores[size_t(i)] != scores[size_t(i)]) scores[size_t(i)] = INFINITY;
            order.assign(scores.begin(), scores.begin() + units);
            std::nth_element(order.begin(), order.begin() + g.count - 1, order.end(), std::greater<>());
            least = order[size_t(g.count - 1)];
            room = g.count;  // of equal ones the first
            for (int64_t i = 0; i < units; ++i) room -= scores[size_t(i)] > least;
        }
        for (int64_t i = 0; i < units; ++i) {
            const bool passes = !(scores[size_t(i)] <= least) || (scores[size_t(i)] == least && room-- > 0);
            for (int64_t k = i * g.group; k < (i + 1) * g.group; ++k) to[k] = passes ? from[k] : 0.0f;
        }
    });
}

const float* routed(const Gate& g, const float* x, int64_t rows, const With& with) {
    thread_local std::vector<float> held[2];
    size_t side = 0;
    for (const Affine& a : g.router) {
        const int64_t width = a.linear->weights().out;
        float* y = sized(held[side], rows * width);
        const Job job{&a.linear->weights(), a.linear->best(Type::f32, rows), y};
        run({&job, 1}, x, rows, with.threads);
        shift(a.bias, y, rows, width, with);
        x = y;
        side = 1 - side;
    }
    return x;
}

Source source_of(const std::string& name) {
    if (name == "input") return Source::input;
    if (name == "hidden") return Source::hidden;
    if (name == "router") return Source::router;
    throw std::invalid_argument("unknown source " + name + "; there are input, hidden and router");
}

const Linear* Map::alone() const {
    const bool one = terms.size() == 1 && terms[0].plain() && terms[0].chain.size() == 1 && terms[0].chain[0].bias.empty() && bias.empty();
    return one ? terms[0].chain[0].linear : nullptr;
}

int64_t bytes(const Map& m) {
    int64_t all = 0;
    for (const Term& t : m.terms)
        for (const Affine& a : t.chain) all += a.linear->bytes();
    return all;
}

void apply(std::span<const Target> targets, const float* x, int64_t rows, const With& with) {
    thread_local Between between;
    thread_local std::vector<Work> work;
    thread_local std::vector<Job> jobs;
    between.free();
    work.clear();
    for (const Target& target : targets)
        for (const Term& t : target.map->terms) {
            const auto seen = std::find_if(work.begin(), work.end(), [&](const Work& w) { return reads_alike(*w.term, t); });
            const float* from = seen != work.end() ? seen->x : t.plain() && !t.gate ? x : ready(t, x, target.map->in, rows, with, between);
            const bool straight = t.chain.size() == 1 && !t.outside && &t == &target.map->terms[0] && target.map->whole();
            const Linear& first = *t.chain[0].linear;
            work.push_back({&t, from, straight ? target.y : between.next(rows * first.weights().out), &target});
        }
    for (const Target& target : targets)
        if (!target.map->whole()) std::fill_n(target.y, rows * target.map->out, 0.0f);
    for (size_t i = 0; i < work.size(); ++i) {
        if (std::any_of(work.begin(), work.begin() + i, [&](const Work& w) { return w.x == work[i].x; })) continue;
        jobs.clear();
        for (size_t j = i; j < work.size(); ++j)
            if (work[j].x == work[i].x) {
                const Linear& first = *work[j].term->chain[0].linear;
                jobs.push_back({&first.weights(), first.best(with.narrowest, rows), work[j].y});
            }
        run(jobs, work[i].x, rows, with.threads);
    }
    for (const Work& w : work) {
        const Term& t = *w.term;
        float* y = w.y;
        for (size_t s = 0; s < t.chain.size(); ++s) {
            const Linear& linear = *t.chain[s].linear;
            if (s) {
                const float* from = y;
                y = between.next(rows * linear.weights().out);
                const Job job{&linear.weights(), linear.best(with.narrowest, rows), y};
                run({&job, 1}, from, rows, with.threads);
            }
            shift(t.chain[s].bias, y, rows, linear.weights().out, with);
        }
        if (y == w.target->y) continue;
        const Map& m = *w.target->map;
        const int64_t width = t.out();
        const bool first = &t == &m.terms[0] && m.whole();
        each_row(rows, t.outside ? width * t.outside->cost() : width, with.threads, [&](int64_t r) {
            float *from = y + r * width, *to = w.target->y + r * m.out + t.begin;
            if (t.outside) {
                if (first) return with.ops->turn(*t.outside, from, to);
                with.ops->turn(*t.outside, from, from);
            }
            if (first) std::copy_n(from, width, to);
            else with.ops->add(to, from, width);
        });
    }
    for (const Target& target : targets) shift(target.map->bias, target.y, rows, target.map->out, with);
}

}  // namespace trimtab
