#include "comm/background.h"

#include <utility>

#include "core/error.h"

namespace lockstep::comm {

Background::Background(std::unique_ptr<Communicator> own) : group_(std::move(own)) {}

Background::~Background() {
  thread_.close();
}

Background::Ticket Background::submit(Work work) {
  thread_.post([this, given = group_->mark(), work = std::move(work)] {
    group_->after(given);
    run(work);
  });
  return ++submitted_;
}

void Background::wait(Ticket ticket) {
  if (ticket > submitted_) {
    throw Error("TICKET_UNKNOWN", "background of group '" + group_->name() + "': expected a ticket of 0.." +
                                      std::to_string(submitted_) + ", received " + std::to_string(ticket));
  }
  std::unique_lock lock(mutex_);
  finished_.wait(lock, [&] { return done_ >= ticket; });
  if (error_ != nullptr && failed_ <= ticket) std::rethrow_exception(error_);
}

void Background::drain() {
  wait(submitted_);
}

void Background::run(const Work& work) {
  std::exception_ptr thrown;
  // Only this thread writes error_.
  if (error_ == nullptr) {
    try {
      work(*group_);
    } catch (const std::exception& error) {
      group_->abort(error.what());
      thrown = std::current_exception();
    } catch (...) {
      group_->abort("background work threw what is no exception");
      thrown = std::current_exception();
    }
  }
  {
    const std::lock_guard lock(mutex_);
    ++done_;
    if (thrown != nullptr) {
      error_ = thrown;
      failed_ = done_;
    }
  }
  finished_.notify_all();
}

}  // namespace lockstep::comm
