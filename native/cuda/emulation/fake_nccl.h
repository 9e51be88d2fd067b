// NCCL between the threads of this process, on emulated GPUs. As with NCCL, whose communicators do not block here, a
// communicator is in progress until all ranks have joined; two ranks are connected, each direction for itself, where
// one first sends to the other; a group is in progress until both ends of all that it connects have asked for it, and
// only then on its stream; a GPU runs what was started on it one after the other. A rank that does not come keeps the
// others waiting until they abort, and a rank that aborts is lost to the others.
// Where NCCL would hang or corrupt memory because ranks call different things, their communicator gets an asynchronous
// error. With LOCKSTEP_EMULATION_FAULT=no-nccl there is none; nccl-init, nccl-call and nccl-later are faults of rank 1
// of a group: when it joins, in a call, after it. Only the emulated build has it.
#pragma once

#include "comm/nccl/nccl_api.h"

namespace lockstep::comm::nccl {

Library fakeLibrary();

}  // namespace lockstep::comm::nccl
