#include "binding/state.h"

#include <optional>
#include <utility>
#include <vector>

#include "binding/convert.h"
#include "binding/device.h"
#include "core/error.h"

namespace lockstep::binding {

namespace {

using transfer::Place;
using transfer::StateGroup;

// Tickets of one call; they end with it, whether it ran or not.
class Claim {
 public:
  Claim(std::shared_ptr<ModelState> state, unsigned groups) : state_(std::move(state)) {
    unsigned bit = 1;
    for (StateGroup* group : state_->groups()) {
      if (groups & bit) tickets_.emplace_back(group, group->issue(StateGroup::Kind::kUse));
      bit *= 2;
    }
  }
  ~Claim() {
    for (const auto& [group, ticket] : tickets_) group->end(StateGroup::Kind::kUse, ticket);
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;

  void enter() const {
    for (const auto& [group, ticket] : tickets_) {
      group->await(StateGroup::Kind::kUse, ticket);
      if (group->absentBytes() == 0) continue;
      throw Error("STATE_NOT_ON_DEVICE",
                  "the call needs the model's " + group->name() + ", of which " + std::to_string(group->absentBytes()) +
                      " of " + std::to_string(group->bytes()) + " bytes are not on the device; move them there first");
    }
  }

 private:
  std::shared_ptr<ModelState> state_;
  std::vector<std::pair<StateGroup*, uint64_t>> tickets_;
};

StateGroup& groupAt(ModelState& state, Napi::Object o) {
  const std::string name = stringAt(o, "group");
  for (StateGroup* group : state.groups()) {
    if (group->name() == name) return *group;
  }
  invalid(o.Env(), "group", "parameters, gradients or optimizer");
}

Place placeAt(Napi::Object o) {
  const std::string name = stringAt(o, "place");
  for (const Place place : {Place::kDevice, Place::kHost, Place::kFile, Place::kDropped}) {
    if (name == nameOf(place)) return place;
  }
  invalid(o.Env(), "place", "device, host, file or dropped");
}

Napi::Object toObject(Napi::Env env, const StateGroup& group) {
  const transfer::Counts counts = group.counts();
  auto o = Napi::Object::New(env);
  o.Set("place", nameOf(group.place()));
  o.Set("absentBytes", static_cast<double>(group.absentBytes()));
  o.Set("offloadBytes", static_cast<double>(counts.offloadBytes));
  o.Set("restoreBytes", static_cast<double>(counts.restoreBytes));
  o.Set("droppedBytes", static_cast<double>(counts.droppedBytes));
  o.Set("offloadSeconds", counts.offloadSeconds);
  o.Set("restoreSeconds", counts.restoreSeconds);
  return o;
}

}  // namespace

std::function<void()> claimed(const std::shared_ptr<ModelState>& state, unsigned groups, std::function<void()> work) {
  return [state, claim = std::make_shared<Claim>(state, groups), work = std::move(work)] {
    try {
      claim->enter();
    } catch (const Error&) {
      state->model->together([] { throw; });  // the same error, and the end of the other ranks' wait
    }
    work();
  };
}

std::shared_ptr<ModelState> ModelWrap::state(Napi::Env env) const {
  open(env);
  return state_;
}

// {parameters, gradients, optimizer}: {place, absentBytes, offloadBytes, restoreBytes, droppedBytes, offloadSeconds,
// restoreSeconds}
Napi::Value ModelWrap::state(const Napi::CallbackInfo& info) {
  auto out = Napi::Object::New(info.Env());
  for (const StateGroup* group : state(info.Env())->groups()) out.Set(group->name(), toObject(info.Env(), *group));
  return out;
}

// move({moves: [{model, group, place}], chunkBytes, folder, workspaceBytes?}): resolves when all have arrived
Napi::Value DeviceWrap::move(const Napi::CallbackInfo& info) {
  const auto o = info[0].As<Napi::Object>();
  const auto list = objectAt(o, "moves").As<Napi::Array>();
  std::vector<std::shared_ptr<ModelState>> states;
  std::vector<std::pair<StateGroup*, Place>> wanted;
  for (uint32_t i = 0; i < list.Length(); ++i) {
    const auto each = list.Get(i).As<Napi::Object>();
    states.push_back(ModelWrap::Unwrap(objectAt(each, "model"))->state(info.Env()));
    wanted.emplace_back(&groupAt(*states.back(), each), placeAt(each));
  }
  const auto chunkBytes = static_cast<size_t>(integerAt(o, "chunkBytes"));
  const std::string folder = stringAt(o, "folder");
  std::optional<size_t> workspaceBytes;
  if (has(o, "workspaceBytes")) workspaceBytes = static_cast<size_t>(integerAt(o, "workspaceBytes"));
  // Everything is valid: from here on tickets are out.
  std::vector<transfer::Move> moves;
  for (const auto& [group, place] : wanted) moves.push_back({group, place, group->issue(StateGroup::Kind::kMove)});
  std::vector<std::shared_ptr<model::Model>> reducing;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const auto& [group, place] = wanted[i];
    // What is dropped is zero: no reduction is under way.
    const bool kept = place == Place::kHost || place == Place::kFile;
    if (group == &states[i]->gradients && kept) reducing.push_back(states[i]->model);
  }
  std::shared_future<void> ready;
  if (workspaceBytes || !reducing.empty()) {
    ready = rank_->after([rank = rank_.get(), workspaceBytes, reducing] {
      if (workspaceBytes) rank->trim(*workspaceBytes);
      for (const auto& model : reducing) model->settleGradients();
    });
  }
  auto work = [rank = rank_, states, moves, chunkBytes, folder, ready] {
    transfer::exchange(ready, moves, chunkBytes, folder, rank->cancelled());
  };
  return rank_->transfer(info.Env(), work, [](Napi::Env env) { return env.Undefined(); });
}

// {device, host}: {used, highWater} in bytes, of all models and the workspace
Napi::Value DeviceWrap::spaces(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  auto out = Napi::Object::New(env);
  const auto give = [&](const char* name, const MemorySpace& space) {
    auto o = Napi::Object::New(env);
    o.Set("used", static_cast<double>(space.used()));
    o.Set("highWater", static_cast<double>(space.highWater()));
    out.Set(name, o);
  };
  give("device", rank_->memory());
  give("host", rank_->host().space());
  return out;
}

}  // namespace lockstep::binding
