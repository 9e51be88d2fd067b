#include "kernels/reference/reference.h"

namespace lockstep::kernels {

const Kernels& referenceKernels() {
  static const Kernels table = reference::tableOf("reference", 2);
  return table;
}

}  // namespace lockstep::kernels
