// The blocks of a weight in the order in which they are worked off.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace dsbert {

// One side of a weight (`groups` of it) is cut into chunks of which a cache holds what belongs to it; within a chunk the
// blocks go by the lines of the other side. A segment is what one line has in one chunk: line l of chunk c has blocks
// start[c * lines + l] to start[c * lines + l + 1], by ascending group, as the line lists them.
struct Segments {
  int64_t groups, chunks, per_chunk;
  std::vector<int64_t> start;
  std::vector<int32_t> slots, group;  // of every block; its group within the chunk

  // The slots of line l are listed[ptr[l]] to listed[ptr[l + 1]]. A chunk has at most `most` groups, one or more.
  Segments(const int32_t* ptr, const int32_t* listed, const int32_t* group_of, int64_t lines, int64_t groups_, int64_t most)
      : groups(groups_) {
    chunks = std::max<int64_t>(1, (groups + most - 1) / most);
    per_chunk = (groups + chunks - 1) / chunks;
    start.assign(chunks * lines + 1, 0);
    for (int64_t l = 0; l < lines; ++l)
      for (int32_t i = ptr[l]; i < ptr[l + 1]; ++i) ++start[group_of[listed[i]] / per_chunk * lines + l + 1];
    for (int64_t s = 0; s < chunks * lines; ++s) start[s + 1] += start[s];
    slots.resize(ptr[lines]);
    group.resize(ptr[lines]);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t l = 0; l < lines; ++l)
      for (int32_t i = ptr[l]; i < ptr[l + 1]; ++i) {
        const int64_t chunk = group_of[listed[i]] / per_chunk, at = next[chunk * lines + l]++;
        slots[at] = listed[i];
        group[at] = int32_t(group_of[listed[i]] - chunk * per_chunk);
      }
  }

  int64_t groups_in(int64_t chunk) const { return std::max<int64_t>(0, std::min(per_chunk, groups - chunk * per_chunk)); }
};

}  // namespace dsbert
