#include "experts.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "memory.h"
#include "pairs.h"
#include "powers.h"
#include "stores.h"
#include "vectors.h"

namespace {

constexpr int64_t kRowsAtOnce = 40 * kTileRows;  // of a task: the share of a thread where one expert has most rows
constexpr int64_t kWorthATeam = 1 << 15;  // multiplications: below, waking threads costs more

int team_for(const ExpertSize& size, int64_t num_rows, int threads) {
    return num_rows * size.elements() < kWorthATeam ? 1 : threads;
}

// The rows of one expert, or a block of them.
struct Job {
    const uint16_t* packed;
    int64_t first, count;
};

std::vector<Job> jobs_of(const Experts& experts, const int64_t* count_of_slot) {
    std::vector<Job> jobs;
    int64_t first = 0;
    for (int64_t slot = 0; slot < experts.num_slots; ++slot) {
        const int64_t end = first + count_of_slot[slot];
        for (; first < end; first += jobs.back().count)
            jobs.push_back({experts.packed + slot * experts.size.elements(), first, std::min(kRowsAtOnce, end - first)});
    }
    return jobs;
}

__m512 silu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp_16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// One panel of a weight and what it multiplies.
struct Task {
    const Job* job;
    const uint16_t* weights;
    int64_t column, width;

    int64_t bytes(int64_t inputs) const { return width * pairs_of(inputs) * 4; }
};

// The panels of all jobs' weights, taken by whichever thread is free. Each thread holds the one after its present one
// already, so that it knows what to prefetch.
class Tasks {
  public:
    Tasks(const std::vector<Job>& jobs, int64_t offset, int64_t columns, int64_t inputs)
        : jobs_(jobs), offset_(offset), columns_(columns), inputs_(inputs), panels_((columns + kPanel - 1) / kPanel) {}

    template <class Work> void run(Work&& work) {
        const int64_t end = panels_ * static_cast<int64_t>(jobs_.size());
        int64_t taken = next_.fetch_add(1, std::memory_order_relaxed);
        while (taken < end) {
            const int64_t then = next_.fetch_add(1, std::memory_order_relaxed);
            const Task task = at(taken);
            const Task following = then < end ? at(then) : Task{nullptr, task.weights, 0, 0};
            work(task, following.weights, following.bytes(inputs_));
            taken = then;
        }
    }

  private:
    Task at(int64_t task) const {
        const Job& job = jobs_[task / panels_];
        const int64_t column = task % panels_ * kPanel;
        const uint16_t* weights = job.packed + offset_ + packed_size(column, inputs_);
        return {&job, weights, column, panel_width(column, columns_)};
    }

    const std::vector<Job>& jobs_;
    int64_t offset_, columns_, inputs_, panels_;
    alignas(64) std::atomic<int64_t> next_{0};
};

// Where finished rows go: row r to base + index[r] * stride.
struct Outputs {
    uint16_t* base;
    int64_t stride;
    const int32_t* index;  // null: row r is the r-th

    uint16_t* row(int64_t r) const { return base + (index == nullptr ? r : index[r]) * stride; }
};

template <int kVectors>
void gate_up_panel(const ExpertSize& size, const Rows& x, const Task& task, const void* ahead, int64_t ahead_bytes,
                   uint16_t* hidden) {
    const Job& job = *task.job;
    multiply_rows<kVectors>(
        x, job.first, job.count, size.model_width, task.weights, 2 * task.width, ahead, ahead_bytes,
        [&](int64_t row, const __m512(&sum)[kVectors]) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors / 2; ++v) {
                const int64_t at = task.column / 2 + kLanes * v;
                const __m512 h = _mm512_mul_ps(silu(sum[v]), sum[v + kVectors / 2]);
                put_rounded(hidden + row * size.width + at, h, lanes(size.width - at));
            }
        });
}

template <int kVectors>
void down_panel(const ExpertSize& size, const Rows& hidden, const Task& task, const void* ahead, int64_t ahead_bytes,
                const Outputs& y) {
    const Job& job = *task.job;
    multiply_rows<kVectors>(
        hidden, job.first, job.count, size.width, task.weights, 2 * task.width, ahead, ahead_bytes,
        [&](int64_t row, const __m512(&sum)[kVectors]) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = task.column + kLanes * v;
                put_rounded(y.row(row) + at, sum[v], lanes(size.model_width - at));
            }
        });
}

// The sum over a token's rows, in fp32 and in order.
void sum_token(const uint16_t* rows, const float* weights, int64_t per_token, int64_t width, uint16_t* y) {
    for (int64_t at = 0; at < width; at += kLanes) {
        const __mmask16 mask = lanes(width - at);
        const auto term = [&](int64_t k) {
            return _mm512_mul_ps(load_bf16(rows + k * width + at, mask), _mm512_set1_ps(weights[k]));
        };
        __m512 sum = term(0);
        for (int64_t k = 1; k < per_token; ++k) sum = _mm512_add_ps(sum, term(k));
        put_rounded(y + at, sum, mask);
    }
}

// Both products of all jobs, by the threads of the region around.
struct Phases {
    const ExpertSize& size;
    Rows x, hidden;
    uint16_t* hidden_out;
    Outputs y;
    Tasks gate_up, down;

    void run() {
        gate_up.run([&](const Task& task, const void* ahead, int64_t bytes) {
            if (task.width == kPanel) gate_up_panel<4>(size, x, task, ahead, bytes, hidden_out);
            else gate_up_panel<2>(size, x, task, ahead, bytes, hidden_out);
        });
#pragma omp barrier
        down.run([&](const Task& task, const void* ahead, int64_t bytes) {
            switch (task.width / kLanes) {
                case 1: down_panel<1>(size, hidden, task, ahead, bytes, y); break;
                case 2: down_panel<2>(size, hidden, task, ahead, bytes, y); break;
                case 3: down_panel<3>(size, hidden, task, ahead, bytes, y); break;
                case 4: down_panel<4>(size, hidden, task, ahead, bytes, y); break;
            }
        });
    }
};

Phases phases_of(const ExpertSize& size, const std::vector<Job>& jobs, const Rows& x, uint16_t* hidden,
                 const Outputs& y) {
    return {size,
            x,
            Rows{hidden, size.width, nullptr},
            hidden,
            y,
            Tasks(jobs, 0, size.gate_up_columns(), size.model_width),
            Tasks(jobs, size.gate_up_elements(), size.model_width, size.width)};
}

// What the threads of a team share while they mix: working memory of the thread that made it.
struct Mixing {
    std::vector<Job> jobs;
    uint16_t* rows;  // finished ones, in the order of pairs
    Phases phases;

    // Null if a slot does not exist.
    static Mixing* make(const Experts& experts, const Rows& x, int64_t num_pairs, int64_t per_token,
                        const int64_t* slots, int64_t* count_of_slot) {
        const ExpertSize& size = experts.size;
        auto* token = static_cast<int32_t*>(scratch(num_pairs * (2 * sizeof(int32_t) + size.row_bytes())));
        auto* pair = token + num_pairs;
        auto* hidden = reinterpret_cast<uint16_t*>(pair + num_pairs);
        auto* rows = hidden + num_pairs * size.width;
        if (!sort_pairs(slots, per_token, {num_pairs, token, pair, count_of_slot, experts.num_slots})) return nullptr;
        return new Mixing(jobs_of(experts, count_of_slot), size, {x.base, x.stride, token}, hidden, rows, pair);
    }

  private:
    Mixing(std::vector<Job>&& its_jobs, const ExpertSize& size, const Rows& x, uint16_t* hidden, uint16_t* its_rows,
           const int32_t* pair)
        : jobs(std::move(its_jobs)),
          rows(its_rows),
          phases(phases_of(size, jobs, x, hidden, {its_rows, size.model_width, pair})) {}
};

}  // namespace

void pack_expert(const ExpertSize& size, const uint16_t* gate_up, const uint16_t* down, uint16_t* packed) {
    const int64_t columns = size.gate_up_columns();
    for (int64_t first = 0; first < columns; first += kPanel) {
        const int64_t width = panel_width(first, columns), half = width / 2;
        const uint16_t* row_of_column[kPanel];
        for (int64_t c = 0; c < half; ++c) {
            const int64_t row = first / 2 + c;
            const bool there = row < size.width;
            row_of_column[c] = there ? gate_up + row * size.model_width : nullptr;
            row_of_column[half + c] = there ? gate_up + (size.width + row) * size.model_width : nullptr;
        }
        pack_panel(row_of_column, width, size.model_width, packed + packed_size(first, size.model_width));
    }
    pack_weight(down, size.model_width, size.width, packed + size.gate_up_elements(), 1);
}

void apply_experts(const Experts& experts, const Rows& x, const int64_t* count_of_slot, int64_t num_rows, uint16_t* y,
                   int threads) {
    const ExpertSize& size = experts.size;
    auto* hidden = static_cast<uint16_t*>(scratch(num_rows * size.width * sizeof(uint16_t)));
    const std::vector<Job> jobs = jobs_of(experts, count_of_slot);
    Phases phases = phases_of(size, jobs, x, hidden, {y, size.model_width, nullptr});
#pragma omp parallel num_threads(team_for(size, num_rows, threads))
    phases.run();
}

bool mix_experts(const Experts& experts, const Rows& x, int64_t num_tokens, int64_t per_token, const int64_t* slots,
                 const float* weights, uint16_t* y, int64_t* count_of_slot, int threads) {
    bool ok = false;
#pragma omp parallel num_threads(team_for(experts.size, num_tokens * per_token, threads))
    {
        const bool mine = mix_experts_by_team(experts, x, num_tokens, per_token, slots, weights, y, count_of_slot);
#pragma omp single
        ok = mine;
    }
    return ok;
}

bool mix_experts_by_team(const Experts& experts, const Rows& x, int64_t num_tokens, int64_t per_token,
                         const int64_t* slots, const float* weights, uint16_t* y, int64_t* count_of_slot) {
    const ExpertSize& size = experts.size;
    Mixing* mixing = nullptr;
#pragma omp single copyprivate(mixing)
    mixing = Mixing::make(experts, x, num_tokens * per_token, per_token, slots, count_of_slot);
    if (mixing == nullptr) return false;
    mixing->phases.run();
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t t = 0; t < num_tokens; ++t)
        sum_token(mixing->rows + t * per_token * size.model_width, weights + t * per_token, per_token, size.model_width,
                  y + t * size.model_width);
#pragma omp single nowait
    delete mixing;
    return true;
}
