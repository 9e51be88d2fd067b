// JavaScript objects to native structs. Everything is checked here, at the top of a binding; errors name the field.
#pragma once

#include <napi.h>

#include <string>
#include <vector>

#include "model/model.h"
#include "model/parameters.h"
#include "model/spec.h"

namespace lockstep::binding {

// Throws Napi::Error (code INVALID_ARGUMENT) naming `what`.
[[noreturn]] void invalid(Napi::Env, const std::string& what, const std::string& expected);

Napi::Object objectAt(Napi::Object, const char* key);
double numberAt(Napi::Object, const char* key);
int64_t integerAt(Napi::Object, const char* key);
bool booleanAt(Napi::Object, const char* key);
std::string stringAt(Napi::Object, const char* key);
uint64_t bitsAt(Napi::Object, const char* key);  // a bigint, its low 64 bits
std::vector<int64_t> integersAt(Napi::Object, const char* key);
std::vector<int32_t> int32At(Napi::Object, const char* key);  // Int32Array
std::vector<float> float32At(Napi::Object, const char* key);  // Float32Array; empty when absent
bool has(Napi::Object, const char* key);

// Rows of one checkpoint tensor and where they are in the engine: source row, engine tensor, row there, count.
struct Piece {
  int64_t sourceRow, tensor, row, rows;
};

std::vector<Piece> readPieces(Napi::Object);  // of key `pieces`, flat
model::Space readSpace(Napi::Object);         // of key `space`
model::Spec readSpec(Napi::Object);
std::vector<model::BufferSpec> readPlan(Napi::Object);
Napi::Float32Array toFloat32Array(Napi::Env, const std::vector<float>&);
Napi::Int32Array toInt32Array(Napi::Env, const std::vector<int32_t>&);

}  // namespace lockstep::binding
