// The addon without CUDA.
#include "comm/nccl/nccl.h"
#include "core/error.h"

namespace lockstep::comm {

namespace {

constexpr const char* kNotBuilt = "this addon was built without CUDA, and NCCL is for ranks on GPUs";

}  // namespace

NcclStatus ncclStatus() {
  return {"", "", kNotBuilt};
}

Computation computationOf(Queue&) {
  return {};
}

std::unique_ptr<Communicator> overNccl(std::shared_ptr<Communicator> control, int, Computation) {
  control->abort(kNotBuilt);
  throw Error("NCCL_UNAVAILABLE", kNotBuilt);
}

}  // namespace lockstep::comm
