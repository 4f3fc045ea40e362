#include "attention_piece.h"

#include <cmath>
#include <utility>

#include "scratch.h"
#include "stores.h"
#include "powers.h"
#include "vectors.h"

namespace {

// What is known of some rows after some keys. Sums are relative to the maximum, which counts in powers of two.
struct Sums {
    float* values_RW;
    float* total_RX;  // 16 lanes of one sum
    float* maximum_R;
};

struct Range {
    int begin, end;
};

// The queries that see any key of positions begin .. end - 1.
Range seeing(const Queries& queries, int window, int begin, int end) {
    const int64_t last = static_cast<int64_t>(end) + window - 2;  // the last position that still sees key end - 1
    return {std::max(0, begin - queries.position),
            static_cast<int>(std::min<int64_t>(queries.count, last - queries.position + 1))};
}

// sums = sums * 2^(maximum - new) + more * 2^(more_maximum - new): the next segment's sums join those before it.
void join_row(float* sums_W, float* total, float* maximum, const float* more_W, float more, float more_maximum,
              int width) {
    const float high = std::max(*maximum, more_maximum);
    const __m512 keep = exp2_16(_mm512_set1_ps(*maximum - high)), take = exp2_16(_mm512_set1_ps(more_maximum - high));
    for (int w = 0; w < width; w += 16) {
        const __m512 kept = _mm512_mul_ps(_mm512_loadu_ps(sums_W + w), keep);
        _mm512_storeu_ps(sums_W + w, _mm512_fmadd_ps(_mm512_loadu_ps(more_W + w), take, kept));
    }
    *total = std::fma(more, _mm512_cvtss_f32(take), *total * _mm512_cvtss_f32(keep));
    *maximum = high;
}

// Divides, rounds, and puts even and odd numbers in order.
void write_row(const float* sums_W, float total, int width, uint16_t* out_W) {
    const __m512 divisor = _mm512_set1_ps(total);
    for (int w = 0; w < width; w += 32) {
        const __m256bh even = _mm512_cvtneps_pbh(_mm512_div_ps(_mm512_loadu_ps(sums_W + w), divisor));
        const __m256bh odd = _mm512_cvtneps_pbh(_mm512_div_ps(_mm512_loadu_ps(sums_W + w + 16), divisor));
        const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32((__m256i)even),
                                             _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)odd), 16));
        put_pairs(out_W + w, both, lanes((width - w) / 2));
    }
}

class Worker {
public:
    Worker(const Queries& queries, const AttentionTensors& tensors)
        : queries_(queries), tensors_(tensors), shape_(tensors.shape), group_(group(shape_)),
          stride_(padded(shape_.width)) {
        static thread_local Scratch scratch;
        const size_t rows = static_cast<size_t>(queries_.count) * group_, keys = shape_.width / 2 * kChunk;
        float* memory = scratch.floats(keys + rows * (kChunk + 2 * (stride_ + 16) + 2));
        const auto take = [&](size_t count) { return std::exchange(memory, memory + count); };
        keys_pL_ = reinterpret_cast<uint32_t*>(take(keys));
        scores_RL_ = take(rows * kChunk);
        segment_ = {take(rows * stride_), take(rows * 16), nullptr};
        all_ = {take(rows * stride_), take(rows * 16), nullptr};
        segment_.maximum_R = take(rows);
        all_.maximum_R = take(rows);
    }

    void attend(const Piece& piece) {
        clear(all_, {0, queries_.count});
        end_ = std::min(piece.stop_segment * kSegment, queries_.position + queries_.count);
        const int first = first_key(queries_.position, shape_.window) / kChunk * kChunk;
        fetch(std::max(piece.first_segment * kSegment, first));
        for (int segment = piece.first_segment; segment < piece.stop_segment; ++segment) {
            const int begin = segment * kSegment;
            const Range run = seeing(queries_, shape_.window, begin, begin + kSegment);
            attend_segment(begin, run);
            for (int r = run.begin * group_; r < run.end * group_; ++r) {
                const float* sums_W = segment_.values_RW + r * stride_;
                const float total = sum_of(_mm512_loadu_ps(segment_.total_RX + 16 * r));
                if (piece.partial < 0) {
                    join_all(r, sums_W, total, segment_.maximum_R[r]);
                } else {
                    float* partial = partial_row(piece, segment, r);
                    std::copy_n(sums_W, stride_, partial);
                    partial[stride_] = total;
                    partial[stride_ + 1] = segment_.maximum_R[r];
                }
            }
        }
        if (piece.partial < 0) write_all();
    }

    void join(const Piece& piece) {
        clear(all_, {0, queries_.count});
        for (int segment = piece.first_segment; segment < piece.stop_segment; ++segment) {
            const Range run = seeing(queries_, shape_.window, segment * kSegment, (segment + 1) * kSegment);
            for (int r = run.begin * group_; r < run.end * group_; ++r) {
                const float* partial = partial_row(piece, segment, r);
                join_all(r, partial, partial[stride_], partial[stride_ + 1]);
            }
        }
        write_all();
    }

private:
    void clear(const Sums& sums, Range run) {
        for (int r = run.begin * group_; r < run.end * group_; ++r) {
            std::fill_n(sums.values_RW + r * stride_, stride_, 0.f);
            std::fill_n(sums.total_RX + 16 * r, 16, 0.f);
            sums.maximum_R[r] = -INFINITY;
        }
    }

    float* partial_row(const Piece& piece, int segment, int r) {
        const int64_t rows = static_cast<int64_t>(queries_.count) * group_;
        const int64_t row = piece.partial + (segment - piece.first_segment) * rows + r;
        return tensors_.partials_P + row * partial_stride(shape_);
    }

    void join_all(int r, const float* sums_W, float total, float maximum) {
        float* all_W = all_.values_RW + r * stride_;
        join_row(all_W, all_.total_RX + 16 * r, all_.maximum_R + r, sums_W, total, maximum, stride_);
    }

    void write_all() {
        for (int r = 0; r < queries_.count * group_; ++r) {
            const int64_t row = static_cast<int64_t>(queries_.token + r / group_) * shape_.heads;
            const int head = queries_.kv_head * group_ + r % group_;
            write_row(all_.values_RW + r * stride_, all_.total_RX[16 * r], shape_.width,
                      tensors_.out_TQW + (row + head) * shape_.width);
        }
    }

    void attend_segment(int segment_begin, Range run) {
        clear(segment_, run);
        const int first = first_key(queries_.position + run.begin, shape_.window) / kChunk * kChunk;
        const int end = std::min(segment_begin + kSegment, queries_.position + run.end);
        for (int begin = std::max(segment_begin, first); begin < end; begin += kChunk)
            attend_chunk(begin, seeing(queries_, shape_.window, begin, begin + kChunk));
    }

    // The keys of a chunk that query i sees, counted from the chunk's first.
    Range seen(int begin, int i) {
        const int position = queries_.position + i;
        return {std::max(0, first_key(position, shape_.window) - begin), std::min(kChunk, position + 1 - begin)};
    }

    void attend_chunk(int begin, Range run) {
        const Range keys = {seen(begin, run.begin).begin, seen(begin, run.end - 1).end};
        const uint16_t *key_L[kChunk], *value_L[kChunk];
        find(begin, keys, key_L, value_L);
        fetch(begin + kChunk);
        transpose_keys(key_L, keys.end, shape_.width, keys_pL_);
        const int rows = (run.end - run.begin) * group_, blocks = (rows + kMaxRows - 1) / kMaxRows;
        for (int block = 0; block < blocks; ++block) {
            const int first = run.begin * group_ + rows * block / blocks;
            const int stop = run.begin * group_ + rows * (block + 1) / blocks;
            score(first, stop, keys.end);
            for (int r = first; r < stop; ++r) weigh(r, seen(begin, r / group_), keys.end);
            add(first, stop, begin, value_L);
        }
    }

    // Where the keys and values lie. What no query sees is not looked up: another key that is seen stands in.
    void find(int begin, Range keys, const uint16_t** key_L, const uint16_t** value_L) {
        const int size = tensors_.block_size, width = shape_.width;
        const int64_t tile = static_cast<int64_t>(size) * width, to_values = shape_.kv_heads * tile;
        const int32_t* block_B = tensors_.block_SB + queries_.span * tensors_.columns;
        int column = (begin + keys.begin) / size, offset = (begin + keys.begin) % size;
        for (int key = keys.begin; key < keys.end; ++column, offset = 0) {
            const uint16_t* at = tensors_.kv_NCbW + (block_B[column] * 2LL * shape_.kv_heads + queries_.kv_head) * tile;
            for (; offset < size && key < keys.end; ++offset, ++key) {
                key_L[key] = at + static_cast<int64_t>(offset) * width;
                value_L[key] = key_L[key] + to_values;
            }
        }
        std::fill(key_L, key_L + keys.begin, key_L[keys.begin]);
        std::fill(key_L + keys.end, key_L + kChunk, key_L[keys.begin]);
    }

    // Asks for the keys and values of a chunk before they are needed: a block is too short for the processor to see
    // by itself what comes next.
    void fetch(int begin) {
        const int end = std::min(begin + kChunk, end_);
        if (begin >= end) return;
        const uint16_t *key_L[kChunk], *value_L[kChunk];
        find(begin, {0, end - begin}, key_L, value_L);
        for (int key = 0; key < end - begin; ++key) {
            for (int w = 0; w < shape_.width; w += 32) {
                _mm_prefetch(reinterpret_cast<const char*>(key_L[key] + w), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(value_L[key] + w), _MM_HINT_T0);
            }
        }
    }

    void score(int first, int stop, int num_keys) {
        const uint16_t* q_R[kMaxRows];
        const int64_t token_stride = static_cast<int64_t>(heads_of_token(shape_)) * shape_.width;
        for (int r = first; r < stop; ++r)
            q_R[r - first] = tensors_.qkv_TNW + (queries_.token + r / group_) * token_stride +
                             (queries_.kv_head * group_ + r % group_) * shape_.width;
        multiply_keys(q_R, stop - first, keys_pL_, num_keys, shape_.width, shape_.scale * 1.44269504088896341f,
                      scores_RL_ + first * kChunk);
    }

    // Scores to exponentials, relative to the largest score so far; the sums so far are scaled down to it.
    void weigh(int r, Range keys, int num_keys) {
        const int vectors = (num_keys + 15) / 16;
        const uint64_t seen = (keys.end == 64 ? ~0ull : (1ull << keys.end) - 1) & ~((1ull << keys.begin) - 1);
        const __m512 least = _mm512_set1_ps(-INFINITY);
        __m512 score[kChunk / 16], largest = least;
        for (int v = 0; v < vectors; ++v) {
            score[v] = _mm512_mask_loadu_ps(least, seen >> (16 * v), scores_RL_ + r * kChunk + 16 * v);
            largest = _mm512_max_ps(largest, score[v]);
        }
        const float maximum = std::max(segment_.maximum_R[r], _mm512_reduce_max_ps(largest));
        const __m512 scale = exp2_16(_mm512_set1_ps(segment_.maximum_R[r] - maximum));
        __m512 total = _mm512_mul_ps(_mm512_loadu_ps(segment_.total_RX + 16 * r), scale);
        for (int v = 0; v < vectors; ++v) {
            const __m512 prob = exp2_16(_mm512_sub_ps(score[v], _mm512_set1_ps(maximum)));
            total = _mm512_add_ps(total, prob);
            _mm512_storeu_ps(scores_RL_ + r * kChunk + 16 * v, prob);
        }
        _mm512_storeu_ps(segment_.total_RX + 16 * r, total);
        segment_.maximum_R[r] = maximum;
        for (int w = 0; w < stride_; w += 16) {
            float* sums = segment_.values_RW + r * stride_ + w;
            _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), scale));
        }
    }

    // A key that a row does not see is not even multiplied by zero: its value may be a NaN. Keys that all rows see are
    // added to all of them at once, those before and after row by row.
    void add(int first, int stop, int begin, const uint16_t* const* value_L) {
        const int from = seen(begin, (stop - 1) / group_).begin, to = std::max(from, seen(begin, first / group_).end);
        const auto add_to = [&](int r, int rows, int key, int end) {
            if (key < end) add_values(scores_RL_ + r * kChunk, rows, value_L, key, end, shape_.width, sums(r));
        };
        for (int r = first; r < stop; ++r) {
            const Range own = seen(begin, r / group_);
            add_to(r, 1, own.begin, std::min(from, own.end));
        }
        add_to(first, stop - first, from, to);
        for (int r = first; r < stop; ++r) add_to(r, 1, to, seen(begin, r / group_).end);
    }

    float* sums(int r) { return segment_.values_RW + r * stride_; }

    const Queries& queries_;
    const AttentionTensors& tensors_;
    const AttentionShape& shape_;
    const int group_, stride_;
    int end_ = 0;  // of the piece's keys
    uint32_t* keys_pL_;
    float* scores_RL_;
    Sums segment_, all_;
};

}  // namespace

void attend(const Piece& piece, const AttentionTensors& tensors) { Worker(piece.queries, tensors).attend(piece); }

void join(const Piece& piece, const AttentionTensors& tensors) { Worker(piece.queries, tensors).join(piece); }
