// Pairs of a token and an expert's slot, sorted.
#pragma once

#include <cstdint>

// Sorted by slot and among equals by pair, where pair p belongs to token p / per_token.
struct SortedPairs {
    int64_t count;
    int32_t* token;        // of each sorted place
    int32_t* pair;         // of each sorted place
    int64_t* count_of_slot;
    int64_t num_slots;
};

// Fills token, pair and count_of_slot. False if a slot is not in [0, num_slots).
bool sort_pairs(const int64_t* slot_of_pair, int64_t per_token, const SortedPairs& sorted);
