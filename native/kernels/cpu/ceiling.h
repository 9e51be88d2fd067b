#pragma once

#include "kernels/ceiling.h"

namespace lockstep::kernels::LOCKSTEP_ISA {

const Ceiling& ceiling();

}  // namespace lockstep::kernels::LOCKSTEP_ISA
