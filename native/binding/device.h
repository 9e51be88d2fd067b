// Device, World and Model as JavaScript classes.
#pragma once

#include <napi.h>

#include <memory>
#include <vector>

#include "binding/rank.h"
#include "binding/state.h"
#include "comm/communicator.h"
#include "model/model.h"

namespace lockstep::binding {

class DeviceWrap : public Napi::ObjectWrap<DeviceWrap> {
 public:
  static Napi::Function define(Napi::Env);
  explicit DeviceWrap(const Napi::CallbackInfo&);
  const std::shared_ptr<Rank>& rank() const { return rank_; }

 private:
  Napi::Value memory(const Napi::CallbackInfo&);
  Napi::Value limitWorkspace(const Napi::CallbackInfo&);
  Napi::Value close(const Napi::CallbackInfo&);
  Napi::Value bench(const Napi::CallbackInfo&);
  Napi::Value move(const Napi::CallbackInfo&);
  Napi::Value spaces(const Napi::CallbackInfo&);

  std::shared_ptr<Rank> rank_;
};

// new World(ranks, timeoutSeconds): ranks of this process, whose handles models take.
class WorldWrap : public Napi::ObjectWrap<WorldWrap> {
 public:
  static Napi::Function define(Napi::Env);
  explicit WorldWrap(const Napi::CallbackInfo&);
  // The handle of a rank, once.
  std::shared_ptr<comm::Communicator> take(Napi::Env, int64_t rank);

 private:
  std::vector<std::unique_ptr<comm::Communicator>> handles_;
};

// {world, rank}: the handle of a rank; the end of its device ends its waits.
std::shared_ptr<comm::Communicator> takeHandle(Napi::Object, Rank&);

class ModelWrap : public Napi::ObjectWrap<ModelWrap> {
 public:
  static Napi::Function define(Napi::Env);
  explicit ModelWrap(const Napi::CallbackInfo&);
  // The model's state, or a CLOSED error.
  std::shared_ptr<ModelState> state(Napi::Env) const;

 private:
  Napi::Value join(const Napi::CallbackInfo&);
  Napi::Value load(const Napi::CallbackInfo&);
  Napi::Value snapshot(const Napi::CallbackInfo&);
  Napi::Value save(const Napi::CallbackInfo&);
  Napi::Value forward(const Napi::CallbackInfo&);
  Napi::Value backward(const Napi::CallbackInfo&);
  Napi::Value step(const Napi::CallbackInfo&);
  Napi::Value generate(const Napi::CallbackInfo&);
  Napi::Value readRows(const Napi::CallbackInfo&);
  Napi::Value writeRows(const Napi::CallbackInfo&);
  Napi::Value reduceGradients(const Napi::CallbackInfo&);
  Napi::Value clearGradients(const Napi::CallbackInfo& info);
  Napi::Value publish(const Napi::CallbackInfo&);
  Napi::Value traffic(const Napi::CallbackInfo&);
  Napi::Value memory(const Napi::CallbackInfo&);
  Napi::Value state(const Napi::CallbackInfo&);
  Napi::Value close(const Napi::CallbackInfo&);

  // The model, or a CLOSED error.
  std::shared_ptr<model::Model> open(Napi::Env) const;

  std::shared_ptr<Rank> rank_;
  std::shared_ptr<model::Model> model_;
  std::shared_ptr<ModelState> state_;
};

}  // namespace lockstep::binding
