#include "attention_plan.h"

namespace {

constexpr int kRowsPerTile = 64;      // query heads that share the loads of keys and values
constexpr int kPiecesPerThread = 4;   // so that the last piece to end is short
constexpr double kWorthATeam = 6e5;  // products of numbers, some 15 us; a team costs one or two

struct Range {
    int first_segment, stop_segment;
    double cost;
};

Range range_of(const Queries& queries, const AttentionShape& shape) {
    const int first = first_key(queries.position, shape.window), stop = queries.position + queries.count;
    const double keys = stop - first + kSegment / 8;  // a piece has a cost of its own
    return {first / kSegment, (stop - 1) / kSegment + 1, keys * (queries.count * group(shape) + 4)};
}

std::vector<Queries> cut(const AttentionShape& shape, const std::vector<int>& query_start_S1,
                         const std::vector<int>& context_len_S) {
    const int step = std::max(1, kRowsPerTile / group(shape));
    std::vector<Queries> runs;
    for (int span = 0; span < static_cast<int>(context_len_S.size()); ++span) {
        const int begin = query_start_S1[span], end = query_start_S1[span + 1];
        for (int token = begin; token < end; token += step) {
            const int count = std::min(step, end - token), position = context_len_S[span] - (end - token);
            for (int kv_head = 0; kv_head < shape.kv_heads; ++kv_head)
                runs.push_back({span, token, count, position, kv_head});
        }
    }
    return runs;
}

std::vector<Emptied> emptied(const std::vector<int>& query_start_S1, const std::vector<int>& context_len_S,
                             int block_size) {
    std::vector<Emptied> tails;
    for (int span = 0; span < static_cast<int>(context_len_S.size()); ++span) {
        const int stop = context_len_S[span], written = query_start_S1[span + 1] - query_start_S1[span];
        const int last_block = stop / block_size * block_size;  // begins at or before the first slot not written
        if (last_block < stop && last_block >= stop - written) tails.push_back({span, stop});
    }
    return tails;
}

}  // namespace

AttentionPlan plan_attention(const AttentionShape& shape, const std::vector<int>& query_start_S1,
                             const std::vector<int>& context_len_S, int block_size, int threads) {
    AttentionPlan plan;
    plan.emptied = emptied(query_start_S1, context_len_S, block_size);
    const std::vector<Queries> runs = cut(shape, query_start_S1, context_len_S);
    double total = 0;
    for (const Queries& queries : runs) total += range_of(queries, shape).cost;
    plan.threads = total * shape.width < kWorthATeam ? 1 : threads;
    const double largest = total / (kPiecesPerThread * plan.threads);
    for (const Queries& queries : runs) {
        const Range range = range_of(queries, shape);
        const int segments = range.stop_segment - range.first_segment;
        const int parts = plan.threads == 1 ? 1 : std::clamp(static_cast<int>(range.cost / largest), 1, segments);
        if (parts == 1) {
            plan.pieces.push_back({queries, range.first_segment, range.stop_segment, -1});
            continue;
        }
        const int rows = queries.count * group(shape);
        plan.joined.push_back({queries, range.first_segment, range.stop_segment, plan.num_partials});
        for (int part = 0; part < parts; ++part) {
            const int begin = segments * part / parts, end = segments * (part + 1) / parts;
            plan.pieces.push_back({queries, range.first_segment + begin, range.first_segment + end,
                                   plan.num_partials + static_cast<int64_t>(begin) * rows});
        }
        plan.num_partials += static_cast<int64_t>(segments) * rows;
    }
    std::stable_sort(plan.pieces.begin(), plan.pieces.end(), [&](const Piece& a, const Piece& b) {
        const auto cost = [&](const Piece& piece) {
            return (piece.stop_segment - piece.first_segment) * piece.queries.count;
        };
        return cost(a) > cost(b);
    });
    return plan;
}
