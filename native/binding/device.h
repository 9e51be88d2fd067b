// Device and Model as JavaScript classes.
#pragma once

#include <napi.h>

#include <memory>

#include "binding/rank.h"
#include "model/model.h"

namespace lockstep::binding {

class DeviceWrap : public Napi::ObjectWrap<DeviceWrap> {
 public:
  static Napi::Function define(Napi::Env);
  explicit DeviceWrap(const Napi::CallbackInfo&);
  const std::shared_ptr<Rank>& rank() const { return rank_; }

 private:
  Napi::Value memory(const Napi::CallbackInfo&);
  Napi::Value close(const Napi::CallbackInfo&);
  Napi::Value bench(const Napi::CallbackInfo&);

  std::shared_ptr<Rank> rank_;
};

class ModelWrap : public Napi::ObjectWrap<ModelWrap> {
 public:
  static Napi::Function define(Napi::Env);
  explicit ModelWrap(const Napi::CallbackInfo&);

 private:
  Napi::Value load(const Napi::CallbackInfo&);
  Napi::Value forward(const Napi::CallbackInfo&);
  Napi::Value backward(const Napi::CallbackInfo&);
  Napi::Value step(const Napi::CallbackInfo&);
  Napi::Value generate(const Napi::CallbackInfo&);
  Napi::Value readRows(const Napi::CallbackInfo&);
  Napi::Value writeRows(const Napi::CallbackInfo&);
  Napi::Value publish(const Napi::CallbackInfo&);
  Napi::Value memory(const Napi::CallbackInfo&);
  Napi::Value close(const Napi::CallbackInfo&);

  // The model, or a CLOSED error.
  std::shared_ptr<model::Model> open(Napi::Env) const;

  std::shared_ptr<Rank> rank_;
  std::shared_ptr<model::Model> model_;
};

}  // namespace lockstep::binding
