// The fast kernels of one instruction set, declared as kernels.h documents them.
#pragma once

#include "kernels/kernels.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

#include "kernels/operations.inc"

}  // namespace lockstep::kernels::LOCKSTEP_ISA
