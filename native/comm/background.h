// Communication behind a rank's computation: gradients behind the backward pass, checksums, transfers. A thread with a
// communicator of its own runs what it is given, in the order given; every rank of the group gives the same in the same
// order, as for calls on one thread.
//
//   Background gradients(group.duplicate("gradients"));
//   const Background::Ticket ticket =
//       gradients.submit([=](Communicator& group) { group.allReduce(bucket, bucket, count, "bucket.3"); });
//   ...                      // the owner computes; the bucket belongs to the work until wait() has returned
//   gradients.wait(ticket);
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "comm/communicator.h"
#include "core/rank_thread.h"

namespace lockstep::comm {

class Background {
 public:
  // Numbers work from 1.
  using Ticket = uint64_t;
  // Runs with denormals flushed. What it throws kills the world, as an error of the rank itself does.
  using Work = std::function<void(Communicator& group)>;

  explicit Background(std::unique_ptr<Communicator> own);
  // Finishes what was given, as drain() without its error: with a dead world at once, with a missing rank after the
  // world's timeout.
  ~Background();
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  // Returns at once. The work's calls wait for what its owner has given to the device by now, not for what follows.
  // After work that threw nothing runs any more.
  Ticket submit(Work work);

  // Returns when the work of a ticket, and all before it, is done; rethrows the first error among them, each time.
  // TICKET_UNKNOWN for a ticket that submit() has not given.
  void wait(Ticket);
  // Waits for all.
  void drain();

  // Kills the world, from any thread: work that waits for other ranks ends, and wait() throws.
  void abort(const std::string& reason) { group_->abort(reason); }

  Traffic traffic() const { return group_->traffic(); }

 private:
  void run(const Work&);

  std::unique_ptr<Communicator> group_;
  std::mutex mutex_;
  std::condition_variable finished_;
  Ticket submitted_ = 0, done_ = 0, failed_ = 0;  // failed_: the ticket of error_
  std::exception_ptr error_;
  RankThread thread_;  // the last member: it ends before what its work uses
};

}  // namespace lockstep::comm
