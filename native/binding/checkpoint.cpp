// Checkpoint files into a model's parameters and back: slices of tensors that layout/ has planned.
#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <utility>

#include "binding/convert.h"
#include "binding/device.h"
#include "core/error.h"
#include "core/range.h"
#include "model/snapshot.h"
#include "transfer/file_slices.h"

namespace lockstep::binding {

namespace {

// The rank's part of one tensor in a file.
struct Slice {
  std::string path;
  transfer::FileTensor tensor;
  int64_t columnBegin, columnCount;  // of the rows in the file, those that the engine's tensor has
  model::Space space;
  std::vector<Piece> pieces;
};

// {file, name, space, dtype, offset, rows, columns, columnBegin, columnCount, transposed, pieces}
Slice readSlice(Napi::Object o) {
  const std::string type = stringAt(o, "dtype");
  const auto stored = type == "F32"    ? transfer::StoredType::kFloat32
                      : type == "BF16" ? transfer::StoredType::kBFloat16
                                       : transfer::StoredType::kFloat16;
  return {stringAt(o, "file"),
          {stringAt(o, "name"), integerAt(o, "offset"), stored, integerAt(o, "rows"), integerAt(o, "columns"),
           booleanAt(o, "transposed")},
          integerAt(o, "columnBegin"),
          integerAt(o, "columnCount"),
          readSpace(o),
          readPieces(o)};
}

std::shared_ptr<std::vector<Slice>> readSlices(Napi::Array list) {
  auto slices = std::make_shared<std::vector<Slice>>();
  for (uint32_t i = 0; i < list.Length(); ++i) slices->push_back(readSlice(list.Get(i).As<Napi::Object>()));
  return slices;
}

void loadSlice(model::Parameters& parameters, const transfer::MappedFile& file, const Slice& slice) {
  constexpr int64_t kRows = 64;
  const int64_t whole = slice.tensor.columns, columns = slice.columnCount;
  std::vector<float> rows(static_cast<size_t>(kRows * whole));
  for (const Piece& piece : slice.pieces) {
    for (int64_t r = 0; r < piece.rows; r += kRows) {
      const int64_t count = std::min(kRows, piece.rows - r);
      transfer::readRows(file, slice.path, slice.tensor, piece.sourceRow + r, count, rows.data());
      for (int64_t i = 0; i < count && columns < whole; ++i) {
        std::copy_n(rows.data() + i * whole + slice.columnBegin, columns, rows.data() + i * columns);
      }
      parameters.writeRows(piece.tensor, slice.space, piece.row + r, count, rows.data());
    }
  }
}

// Where the numbers of a save come from: the parameters themselves, or a copy of them.
using Source = std::function<model::Stored(int64_t tensor, model::Space)>;

void saveSlice(const model::Parameters& parameters, const Source& source, const transfer::FileToFill& file,
               const Slice& slice, const std::atomic<bool>& cancelled) {
  constexpr int64_t kElements = int64_t{1} << 20;
  const int64_t columns = slice.columnCount;
  const int64_t most = std::max<int64_t>(1, kElements / columns);
  std::vector<float> rows, block;
  for (const Piece& piece : slice.pieces) {
    if (!parameters.saves(piece.tensor, slice.space)) continue;
    const model::TensorSpec& tensor = parameters.spec(piece.tensor);
    const model::Stored stored = source(piece.tensor, slice.space);
    for (int64_t r = 0; r < piece.rows; r += most) {
      if (cancelled) throw Error("CLOSED", "the device was closed while it saved a checkpoint");
      const int64_t first = piece.row + r, count = std::min(most, piece.rows - r);
      rows.resize(static_cast<size_t>(count * columns));
      model::Parameters::unpack(tensor, stored, first, count, rows.data());
      for (const model::Block& held : model::Parameters::blocks(tensor, stored, first, count)) {
        const float* data = rows.data() + (held.row - first) * columns;
        if (held.columns < columns) {
          block.resize(static_cast<size_t>(held.rows * held.columns));
          for (int64_t i = 0; i < held.rows; ++i)
            std::copy_n(data + i * columns + held.column, held.columns, block.data() + i * held.columns);
          data = block.data();
        }
        transfer::writeRows(file, slice.tensor, piece.sourceRow + held.row - piece.row, held.rows,
                            slice.columnBegin + held.column, held.columns, data);
      }
    }
  }
}

using SharedSnapshot = std::shared_ptr<model::Snapshot>;

}  // namespace

// load(slices): in the order of files and places; publishes the compute weights
Napi::Value ModelWrap::load(const Napi::CallbackInfo& info) {
  auto work = [model = open(info.Env()), slices = readSlices(info[0].As<Napi::Array>())] {
    const Range range("load");
    model->together([&] {
      std::unique_ptr<transfer::MappedFile> file;
      const std::string* path = nullptr;
      for (const Slice& slice : *slices) {
        if (path == nullptr || *path != slice.path) file = std::make_unique<transfer::MappedFile>(slice.path);
        path = &slice.path;
        loadSlice(model->parameters(), *file, slice);
      }
    });
    model->publish();
  };
  return rank_->call(info.Env(), claimed(state_, kParameters | kOptimizer, work),
                     [](Napi::Env env) { return env.Undefined(); });
}

// snapshot(slices): {bytes, copy} of the tensors that they read; save() takes `copy` once
Napi::Value ModelWrap::snapshot(const Napi::CallbackInfo& info) {
  const auto slices = readSlices(info[0].As<Napi::Array>());
  auto copy = std::make_shared<SharedSnapshot>();
  auto work = [model = open(info.Env()), slices, copy, rank = rank_] {
    const Range range("snapshot");
    std::vector<model::Snapshot::Key> tensors;
    for (const Slice& slice : *slices) {
      for (const Piece& piece : slice.pieces) {
        if (model->parameters().saves(piece.tensor, slice.space)) tensors.emplace_back(piece.tensor, slice.space);
      }
    }
    *copy = std::make_shared<model::Snapshot>(model->parameters(), rank->queue(), tensors);
  };
  return rank_->call(info.Env(), claimed(state_, kParameters | kOptimizer, work), [copy](Napi::Env env) {
    auto result = Napi::Object::New(env);
    result.Set("bytes", static_cast<double>((*copy)->bytes()));
    result.Set("copy", Napi::External<SharedSnapshot>::New(env, new SharedSnapshot(std::move(*copy)),
                                                           [](Napi::Env, SharedSnapshot* held) { delete held; }));
    return result;
  });
}

// save(slices, copy?): writes them into files that have their full length; from a copy while the rank does other work
Napi::Value ModelWrap::save(const Napi::CallbackInfo& info) {
  SharedSnapshot copy;
  if (info[1].IsExternal()) copy = std::exchange(*info[1].As<Napi::External<SharedSnapshot>>().Data(), nullptr);
  const auto slices = readSlices(info[0].As<Napi::Array>());
  const std::atomic<bool>& cancelled = copy ? rank_->saver().cancelled() : rank_->device().cancelled;
  auto work = [model = open(info.Env()), slices, copy, &cancelled] {
    const Range range("save");
    const model::Parameters& parameters = model->parameters();
    const Source source = [&](int64_t tensor, model::Space space) {
      return copy ? copy->at(tensor, space) : parameters.stored(tensor, space);
    };
    std::unique_ptr<transfer::FileToFill> file;
    const std::string* path = nullptr;
    for (const Slice& slice : *slices) {
      if (path == nullptr || *path != slice.path) file = std::make_unique<transfer::FileToFill>(slice.path);
      path = &slice.path;
      saveSlice(parameters, source, *file, slice, cancelled);
    }
  };
  const auto finish = [](Napi::Env env) { return env.Undefined(); };
  if (copy) return rank_->callSaver(info.Env(), work, finish);
  return rank_->call(info.Env(), claimed(state_, kParameters | kOptimizer, work), finish);
}

}  // namespace lockstep::binding
