// Messages between the stages of a pipeline. What a stage has to send goes out together with the next that it receives:
// of two stages where one sends activations forward and the other gradients back, neither waits for the other, so any
// schedule runs on messages that are not buffered.
#pragma once

#include <span>
#include <string_view>

#include "core/view.h"
#include "model/parallel.h"

namespace lockstep::model {

class StageLink {
 public:
  explicit StageLink(const Parallel& parallel) : parallel_(parallel) {}

  // From the stage before (-1) or after (+1).
  void receive(View<float> x, int direction, std::string_view site) {
    if (waiting_.data == x.data) flush(site);  // what comes takes the place of what goes
    const comm::Incoming incoming{line().rank() + direction, x.data, x.rows * x.cols, comm::Element::kFloat32};
    exchange({&incoming, 1}, site);
  }

  // To the stage before or after. x stays as it is until the next receive() or flush() returns.
  void send(View<const float> x, int direction) {
    waiting_ = {line().rank() + direction, x.data, x.rows * x.cols, comm::Element::kFloat32};
  }

  void flush(std::string_view site) {
    if (waiting_.data != nullptr) exchange({}, site);
  }

 private:
  comm::Communicator& line() { return *parallel_.pipeline; }

  void exchange(std::span<const comm::Incoming> incoming, std::string_view site) {
    const comm::Outgoing outgoing = waiting_;
    waiting_ = {};
    line().exchange({&outgoing, outgoing.data == nullptr ? size_t{0} : size_t{1}}, incoming, site);
  }

  const Parallel& parallel_;
  comm::Outgoing waiting_;
};

}  // namespace lockstep::model
