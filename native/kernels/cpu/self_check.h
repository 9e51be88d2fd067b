#pragma once

namespace lockstep::kernels::LOCKSTEP_ISA {

bool selfCheck();

}  // namespace lockstep::kernels::LOCKSTEP_ISA
