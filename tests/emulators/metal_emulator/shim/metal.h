// The subset of the Metal language that the emulator models; see ../README.md.
#pragma once
#include "simd.h"

// MLX pastes its utils.h before every custom kernel: the part of it in use.
template <class U>
struct Limits {
  static constexpr U max = metal::numeric_limits<U>::max();
  static constexpr U min = metal::numeric_limits<U>::lowest();
};

using namespace metal;
