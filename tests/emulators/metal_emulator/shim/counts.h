// Bytes of device memory as the hardware moves them: lanes of one simdgroup that touch the same
// element at the same execution of the same place in the source count once.
//
// "The same execution" is the n-th visit of a lane to the place since the simdgroup's last
// synchronisation. The lanes of a simdgroup run one after another from one synchronisation to the
// next, so two hash tables that are emptied then are all it takes.
#pragma once
#include "state.h"

namespace emu {

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 32)) * 0x9e3779b97f4a7c15u;
  return x ^ (x >> 29);
}

// An open-addressing map from 64-bit keys to counters, emptied in constant time.
struct Table {
  struct Slot {
    uint64_t key;
    uint32_t stamp, value;
  };
  Slot* slots = nullptr;
  uint64_t capacity = 0, used = 0;
  uint32_t stamp = 1;

  void clear() {
    stamp++;
    used = 0;
  }

  uint32_t& at(uint64_t key) {
    if (2 * (used + 1) > capacity) grow();
    for (uint64_t i = mix(key);; i++) {
      Slot& slot = slots[i & (capacity - 1)];
      if (slot.stamp != stamp) {
        slot = {key, stamp, 0};
        used++;
      }
      if (slot.key == key) return slot.value;
    }
  }

 private:
  void grow() {
    Slot* old = slots;
    uint64_t old_capacity = capacity;
    capacity = capacity ? 2 * capacity : 4096;
    slots = static_cast<Slot*>(calloc(capacity, sizeof(Slot)));
    used = 0;
    for (uint64_t i = 0; i < old_capacity; i++) {
      if (old[i].stamp == stamp) at(old[i].key) = old[i].value;
    }
    free(old);
  }
};

inline Table visits;   // place -> times this lane has been there
inline Table touched;  // (place, visit, element) -> 1

inline int64_t count_bytes(const Buffer* b, int64_t offset, uint32_t size, const void* site) {
  uint32_t visit = visits.at(reinterpret_cast<uint64_t>(site))++;
  uint64_t place = mix(reinterpret_cast<uint64_t>(site) + (uint64_t(visit) << 48) + visit) ^
                   reinterpret_cast<uint64_t>(b);
  int64_t bytes = 0;
  uint32_t item = size < b->item ? size : b->item;
  for (uint32_t i = 0; i < size; i += item) {
    uint32_t& seen = touched.at(mix(place) + uint64_t(offset + i));
    if (!seen) bytes += item;
    seen = 1;
  }
  return bytes;
}

}  // namespace emu
