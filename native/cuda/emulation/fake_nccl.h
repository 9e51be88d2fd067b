// NCCL between the threads of this process, on emulated GPUs: as with NCCL, calls are queued on a stream and return, a
// rank that does not come keeps the others waiting until they abort, and a rank that aborts is lost to the others.
// Where NCCL would hang or corrupt memory because ranks call different things, their communicator gets an asynchronous
// error. With LOCKSTEP_EMULATION_FAULT=no-nccl there is none. Only the emulated build has it.
#pragma once

#include "comm/nccl/nccl_api.h"

namespace lockstep::comm::nccl {

Library fakeLibrary();

}  // namespace lockstep::comm::nccl
