// A model's state as groups that move, and the calls that need them on the device.
#pragma once

#include <array>
#include <functional>
#include <memory>

#include "model/model.h"
#include "transfer/state_group.h"

namespace lockstep::binding {

// Bits of the groups that a call needs.
constexpr unsigned kParameters = 1, kGradients = 2, kOptimizer = 4;

struct ModelState {
  ModelState(std::shared_ptr<model::Model> owner, transfer::HostRoom& host)
      : model(std::move(owner)),
        parameters("parameters", model->parameters().weights(), host),
        gradients("gradients", model->parameters().gradients(), host, &model->parameters().gradientsLive()),
        optimizer("optimizer", model->parameters().optimizer(), host) {}

  std::array<transfer::StateGroup*, 3> groups() { return {&parameters, &gradients, &optimizer}; }

  const std::shared_ptr<model::Model> model;
  transfer::StateGroup parameters, gradients, optimizer;
};

// `work` as a job that comes, for the given groups, after the moves issued so far and before those issued later. It
// throws Error("STATE_NOT_ON_DEVICE") in the place of `work` when a group is then elsewhere, and tells the other ranks.
std::function<void()> claimed(const std::shared_ptr<ModelState>&, unsigned groups, std::function<void()> work);

}  // namespace lockstep::binding
