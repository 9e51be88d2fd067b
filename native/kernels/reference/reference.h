// The plain loops, declared as kernels.h documents them.
#pragma once

#include "kernels/kernels.h"

namespace lockstep::kernels::reference {

#include "kernels/operations.inc"

}  // namespace lockstep::kernels::reference
