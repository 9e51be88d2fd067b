// Memory that models and transfers share, and the transfers between the memories of ranks, as JavaScript classes.
#pragma once

#include <napi.h>

#include <memory>
#include <vector>

#include "binding/rank.h"
#include "core/arena.h"
#include "transfer/slices.h"

namespace lockstep::binding {

// new Memory({name, bytes}): an arena by itself.
class MemoryWrap : public Napi::ObjectWrap<MemoryWrap> {
 public:
  static Napi::Function define(Napi::Env);
  explicit MemoryWrap(const Napi::CallbackInfo&);
  // The arena, or a CLOSED error.
  std::shared_ptr<Arena> arena(Napi::Env) const;

 private:
  Napi::Value marks(const Napi::CallbackInfo&);
  Napi::Value discard(const Napi::CallbackInfo&);
  Napi::Value read(const Napi::CallbackInfo&);
  Napi::Value write(const Napi::CallbackInfo&);
  Napi::Value close(const Napi::CallbackInfo&);

  std::shared_ptr<Arena> arena_;
};

// new Transfer(device, {source, destination, group, tensors, slices, ranks}): one rank's part of a list of slices.
class TransferWrap : public Napi::ObjectWrap<TransferWrap> {
 public:
  static Napi::Function define(Napi::Env);
  explicit TransferWrap(const Napi::CallbackInfo&);

 private:
  Napi::Value run(const Napi::CallbackInfo&);
  Napi::Value verify(const Napi::CallbackInfo&);
  Napi::Value close(const Napi::CallbackInfo&);
  std::shared_ptr<transfer::Transfer> open(Napi::Env) const;

  std::shared_ptr<Rank> rank_;
  std::shared_ptr<transfer::Transfer> transfer_;
};

}  // namespace lockstep::binding
