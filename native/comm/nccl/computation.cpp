#include <type_traits>

#include "comm/nccl/nccl.h"
#include "cuda/queue.h"

namespace lockstep::comm {

Computation computationOf(Queue& queue) {
  auto& own = static_cast<cuda::Queue&>(queue);
  return {[&own] { own.synchronize(); },
          [&own] {
            cudaStream_t const stream = own.stream();
            cudaEvent_t made = nullptr;
            cuda::check(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), "making an event");
            const std::shared_ptr<std::remove_pointer_t<cudaEvent_t>> event(made, cudaEventDestroy);
            cuda::check(cudaEventRecord(made, stream), "recording an event");
            return [event] { cuda::check(cudaEventSynchronize(event.get()), "working"); };
          }};
}

}  // namespace lockstep::comm
