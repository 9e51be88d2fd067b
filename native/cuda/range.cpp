#include "core/range.h"

#include "nvtx.h"

namespace lockstep {

void Range::begin(const char* name) {
  nvtxRangePushA(name);
}

void Range::end() {
  nvtxRangePop();
}

}  // namespace lockstep
