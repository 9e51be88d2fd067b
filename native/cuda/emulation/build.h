#pragma once

namespace lockstep::cuda {

inline constexpr const char* kBuild = "emulated";

}  // namespace lockstep::cuda
