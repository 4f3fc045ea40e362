#include "pairs.h"

#include <algorithm>
#include <vector>

bool sort_pairs(const int64_t* slot_of_pair, int64_t per_token, const SortedPairs& sorted) {
    std::fill_n(sorted.count_of_slot, sorted.num_slots, 0);
    for (int64_t pair = 0; pair < sorted.count; ++pair) {
        const int64_t slot = slot_of_pair[pair];
        if (slot < 0 || slot >= sorted.num_slots) return false;
        ++sorted.count_of_slot[slot];
    }
    std::vector<int64_t> next(sorted.num_slots);
    for (int64_t slot = 1; slot < sorted.num_slots; ++slot) next[slot] = next[slot - 1] + sorted.count_of_slot[slot - 1];
    for (int64_t pair = 0; pair < sorted.count; ++pair) {
        const int64_t place = next[slot_of_pair[pair]]++;
        sorted.token[place] = static_cast<int32_t>(pair / per_token);
        sorted.pair[place] = static_cast<int32_t>(pair);
    }
    return true;
}
