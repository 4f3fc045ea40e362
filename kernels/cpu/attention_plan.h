// Which pieces the attention of a step is cut into. No bit of a result depends on it.
//
// Keys are added up in segments of 512 positions, which begin at multiples of 512, and in them in chunks of 64.
// A piece computes some queries of one sequence and one key/value head over a range of segments. Where there are too
// few pieces to keep all threads busy, the segments of a run of queries are dealt out to several pieces, which leave
// their sums behind, one per segment; these are then joined in order.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <vector>

constexpr int kChunk = 64, kSegment = 512;
constexpr int kNoWindow = INT_MAX;

struct AttentionShape {
    int heads, kv_heads, width, rotary_width;
    float scale;
    int window;  // keys that a query sees, its own included; kNoWindow: all
};

struct Queries {
    int span, token;      // row of the block table; the first query's row of the step
    int count, position;  // the first query's position
    int kv_head;
};

struct Piece {
    Queries queries;
    int first_segment, stop_segment;
    int64_t partial;  // where its sums lie, counted in rows (one per segment and query head); -1: in no need of joining
};

struct Emptied {
    int span, position;  // a fresh block's slots from this position on are not written by the step
};

struct AttentionPlan {
    std::vector<Piece> pieces;  // the most expensive first
    std::vector<Piece> joined;  // all segments of those that were dealt out
    std::vector<Emptied> emptied;
    int64_t num_partials = 0;
    int threads = 1;
};

inline int first_key(int position, int window) { return std::max(0, position - window + 1); }

inline int group(const AttentionShape& shape) { return shape.heads / shape.kv_heads; }

// Span s is tokens query_start_S1[s] .. query_start_S1[s + 1] - 1, of a sequence of context_len_S[s] tokens.
// For a team of at most `threads`.
AttentionPlan plan_attention(const AttentionShape& shape, const std::vector<int>& query_start_S1,
                             const std::vector<int>& context_len_S, int block_size, int threads);
