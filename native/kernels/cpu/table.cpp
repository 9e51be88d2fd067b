// The table of one instruction set.
#include "kernels/cpu/cpu.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

const Kernels& table() {
  static const Kernels table = tableOf(LOCKSTEP_ISA_NAME, 2);
  return table;
}

}  // namespace lockstep::kernels::LOCKSTEP_ISA
