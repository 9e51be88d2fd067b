#include "binding/convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "binding/rank.h"

namespace lockstep::binding {

void invalid(Napi::Env env, const std::string& what, const std::string& expected) {
  throw toJavaScript(env, "INVALID_ARGUMENT", "[native] " + what + ": expected " + expected);
}

bool has(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  return !value.IsUndefined() && !value.IsNull();
}

Napi::Object objectAt(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  if (!value.IsObject()) invalid(object.Env(), key, "an object");
  return value.As<Napi::Object>();
}

double numberAt(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  if (!value.IsNumber()) invalid(object.Env(), key, "a number");
  return value.As<Napi::Number>().DoubleValue();
}

int64_t integerAt(Napi::Object object, const char* key) {
  const double x = numberAt(object, key);
  if (x != std::floor(x) || std::fabs(x) > 9007199254740991.0) invalid(object.Env(), key, "an integer");
  return static_cast<int64_t>(x);
}

bool booleanAt(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  if (!value.IsBoolean()) invalid(object.Env(), key, "a boolean");
  return value.As<Napi::Boolean>().Value();
}

std::string stringAt(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  if (!value.IsString()) invalid(object.Env(), key, "a string");
  return value.As<Napi::String>().Utf8Value();
}

uint64_t bitsAt(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  if (!value.IsBigInt()) invalid(object.Env(), key, "a bigint");
  bool lossless = false;
  return value.As<Napi::BigInt>().Uint64Value(&lossless);
}

std::vector<int64_t> integersAt(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  if (!value.IsArray()) invalid(object.Env(), key, "an array of integers");
  const auto array = value.As<Napi::Array>();
  std::vector<int64_t> out;
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const Napi::Value element = array.Get(i);
    if (!element.IsNumber()) invalid(object.Env(), std::string(key) + "[" + std::to_string(i) + "]", "an integer");
    out.push_back(element.As<Napi::Number>().Int64Value());
  }
  return out;
}

std::vector<int32_t> int32At(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array)
    invalid(object.Env(), key, "an Int32Array");
  const auto array = value.As<Napi::Int32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

std::vector<float> float32At(Napi::Object object, const char* key) {
  const Napi::Value value = object.Get(key);
  if (value.IsUndefined() || value.IsNull()) return {};
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_float32_array)
    invalid(object.Env(), key, "a Float32Array");
  const auto array = value.As<Napi::Float32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

namespace {

// Parts that lie apart: the tensor's elements reach from the first part to the end of the last.
void placeParts(Napi::Object o, model::TensorSpec& t) {
  const std::vector<int64_t> offsets = integersAt(o, "partOffsets");
  if (!t.matrix || offsets.size() != t.layout.parts.size())
    invalid(o.Env(), t.name + ".partOffsets", "one offset for each part of a matrix");
  t.layout.elements = 0;
  for (size_t p = 0; p < offsets.size(); ++p) {
    kernels::Part& part = t.layout.parts[p];
    if (offsets[p] < 0) invalid(o.Env(), t.name + ".partOffsets", "offsets from the tensor's first element on");
    part.offset = offsets[p];
    t.layout.elements = std::max(t.layout.elements, part.offset + part.elements());
  }
}

model::TensorSpec readTensor(Napi::Object o) {
  const std::string split = stringAt(o, "split"), kind = stringAt(o, "kind");
  const int64_t out = integerAt(o, "out"), in = integerAt(o, "in"), elements = integerAt(o, "elements");
  model::TensorSpec t;
  t.name = stringAt(o, "name");
  t.matrix = kind == "matrix";
  t.decay = booleanAt(o, "decay");
  const auto cut = split == "out" ? kernels::Split::kOut : split == "in" ? kernels::Split::kIn : kernels::Split::kNone;
  const std::vector<int64_t> sizes = integersAt(o, "sizes");
  int64_t sum = 0;
  for (const int64_t size : sizes) sum += size;
  if (sum != (cut == kernels::Split::kIn ? in : out))
    invalid(o.Env(), t.name + ".sizes", "sizes that add up to the split dimension");
  t.layout = t.matrix ? kernels::WeightLayout::make(out, in, cut, sizes) : model::vectorLayout(out, in, sizes);
  if (has(o, "partOffsets")) placeParts(o, t);
  if (t.layout.elements != elements) {
    invalid(o.Env(), t.name + ".elements",
            std::to_string(t.layout.elements) + " (received " + std::to_string(elements) + ")");
  }
  const auto offset = [&](const char* key) { return has(o, key) ? integerAt(o, key) : model::kAbsent; };
  t.weights = offset("weights");
  t.master = offset("master");
  t.gradient = offset("gradient");
  t.gradient2 = offset("gradient2");
  t.moment1 = offset("moment1");
  t.moment2 = offset("moment2");
  t.cut = booleanAt(o, "cut");
  const std::string summed = has(o, "summed") ? stringAt(o, "summed") : "";
  t.summed = summed == "tensor"     ? model::Summed::kTensor
             : summed == "keyValue" ? model::Summed::kKeyValue
             : summed == "ends"     ? model::Summed::kEnds
                                    : model::Summed::kNever;
  t.summedBegin = t.summed == model::Summed::kNever ? 0 : integerAt(o, "summedBegin");
  t.summedEnd = t.summed == model::Summed::kNever ? 0 : integerAt(o, "summedEnd");
  t.owner = booleanAt(o, "owner");
  t.pieces = integersAt(o, "pieces");
  if (t.pieces.size() < 2 || t.pieces.front() != 0 || t.pieces.back() != elements)
    invalid(o.Env(), t.name + ".pieces", "boundaries from 0 to the number of elements");
  return t;
}

std::vector<model::Unit> readUnits(Napi::Object o, size_t tensors) {
  const auto list = objectAt(o, "units").As<Napi::Array>();
  std::vector<model::Unit> units;
  for (uint32_t i = 0; i < list.Length(); ++i) {
    const auto unit = list.Get(i).As<Napi::Object>();
    units.push_back(
        {integersAt(unit, "tensors"), integersAt(unit, "weights"), static_cast<int>(integerAt(unit, "bucket"))});
    for (const int64_t tensor : units.back().weights) {
      if (tensor < 0 || tensor >= static_cast<int64_t>(tensors)) invalid(o.Env(), "units", "numbers of tensors");
    }
  }
  return units;
}

model::Shape readShape(Napi::Object o) {
  model::Shape s;
  s.vocabulary = integerAt(o, "vocabulary");
  s.width = integerAt(o, "width");
  s.layers = integerAt(o, "layers");
  s.heads = integerAt(o, "heads");
  s.keyValueHeads = integerAt(o, "keyValueHeads");
  s.headWidth = integerAt(o, "headWidth");
  s.feedForward = integerAt(o, "feedForward");
  s.norm = stringAt(o, "norm") == "rms" ? model::Norm::kRms : model::Norm::kLayer;
  s.normEps = static_cast<float>(numberAt(o, "normEpsilon"));
  s.activation = stringAt(o, "activation") == "swiglu" ? kernels::Activation::kSwiGlu : kernels::Activation::kGeluTanh;
  s.headNorm = booleanAt(o, "headNorm");
  s.learnedPositions = booleanAt(o, "learnedPositions");
  s.tied = booleanAt(o, "tied");
  s.maxPositions = integerAt(o, "maxPositions");
  s.windows = integersAt(o, "windows");
  s.head = stringAt(o, "head") == "language" ? model::Head::kLanguage : model::Head::kScalar;
  s.parts = integerAt(o, "parts");
  if (static_cast<int64_t>(s.windows.size()) != s.layers) invalid(o.Env(), "windows", "one entry per layer");
  return s;
}

}  // namespace

model::Space readSpace(Napi::Object o) {
  const std::string space = stringAt(o, "space");
  if (space == "weights") return model::Space::kWeights;
  if (space == "moment1") return model::Space::kMoment1;
  if (space == "moment2") return model::Space::kMoment2;
  if (space == "gradients") return model::Space::kGradients;
  invalid(o.Env(), "space", "weights, moment1, moment2 or gradients");
}

std::vector<Piece> readPieces(Napi::Object o) {
  const std::vector<int64_t> flat = integersAt(o, "pieces");
  std::vector<Piece> pieces;
  for (size_t i = 0; i + 3 < flat.size(); i += 4) pieces.push_back({flat[i], flat[i + 1], flat[i + 2], flat[i + 3]});
  return pieces;
}

model::Spec readSpec(Napi::Object o) {
  model::Spec spec;
  spec.shape = readShape(objectAt(o, "shape"));
  spec.dtype = stringAt(o, "dtype") == "bfloat16" ? DType::kBFloat16 : DType::kFloat32;
  spec.train = booleanAt(o, "train");
  spec.recompute = booleanAt(o, "recompute");
  spec.dataRank = static_cast<int>(integerAt(o, "dataRank"));
  spec.dataRanks = static_cast<int>(integerAt(o, "dataRanks"));
  spec.zero = static_cast<int>(integerAt(o, "zero"));
  spec.overlap = booleanAt(o, "overlap");
  spec.firstLayer = integerAt(o, "firstLayer");
  spec.vocabularyBegin = integerAt(o, "vocabularyBegin");
  spec.vocabularyParts = integersAt(o, "vocabularyParts");
  if (std::accumulate(spec.vocabularyParts.begin(), spec.vocabularyParts.end(), int64_t{0}) != spec.shape.vocabulary)
    invalid(o.Env(), "vocabularyParts", "parts that make up the vocabulary");
  spec.weightsBytes = integerAt(o, "weightsBytes");
  spec.gradientBytes = integerAt(o, "gradientBytes");
  spec.optimizerBytes = integerAt(o, "optimizerBytes");
  spec.cosine = float32At(o, "cosine");
  spec.sine = float32At(o, "sine");
  const auto tensors = objectAt(o, "tensors").As<Napi::Array>();
  for (uint32_t i = 0; i < tensors.Length(); ++i) spec.tensors.push_back(readTensor(tensors.Get(i).As<Napi::Object>()));
  spec.units = readUnits(o, spec.tensors.size());
  if (spec.units.size() != static_cast<size_t>(spec.shape.layers) + 2)
    invalid(o.Env(), "units", "one for each layer, one before and one behind them");
  return spec;
}

std::vector<model::BufferSpec> readPlan(Napi::Object o) {
  const auto names = objectAt(o, "names").As<Napi::Array>();
  const std::vector<int64_t> offsets = integersAt(o, "offsets"), bytes = integersAt(o, "bytes");
  if (offsets.size() != names.Length() || bytes.size() != names.Length())
    invalid(o.Env(), "plan", "as many offsets and bytes as names");
  std::vector<model::BufferSpec> plan;
  for (uint32_t i = 0; i < names.Length(); ++i) {
    plan.push_back({names.Get(i).As<Napi::String>().Utf8Value(), offsets[i], bytes[i]});
  }
  return plan;
}

Napi::Float32Array toFloat32Array(Napi::Env env, const std::vector<float>& data) {
  auto array = Napi::Float32Array::New(env, data.size());
  if (!data.empty()) std::memcpy(array.Data(), data.data(), data.size() * sizeof(float));
  return array;
}

Napi::Int32Array toInt32Array(Napi::Env env, const std::vector<int32_t>& data) {
  auto array = Napi::Int32Array::New(env, data.size());
  if (!data.empty()) std::memcpy(array.Data(), data.data(), data.size() * sizeof(int32_t));
  return array;
}

}  // namespace lockstep::binding
