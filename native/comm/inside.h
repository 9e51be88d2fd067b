// The way past the door of a communicator, for one that is made of another: what it does once the arguments of a call
// were checked and numbered. Member pointers of it apply to any Communicator.
#pragma once

#include "comm/communicator.h"

namespace lockstep::comm {

struct Inside : Communicator {
  using Communicator::fail;
  using Communicator::live;
  using Communicator::refuse;
  using Communicator::runAllGather;
  using Communicator::runAllGatherPieces;
  using Communicator::runAllReduce;
  using Communicator::runBarrier;
  using Communicator::runBroadcast;
  using Communicator::runExchange;
  using Communicator::runReduceScatter;
  using Communicator::runReduceScatterPieces;
  using Communicator::runSplit;
};

}  // namespace lockstep::comm
