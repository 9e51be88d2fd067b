#pragma once

namespace lockstep::cuda {

inline constexpr const char* kBuild = "hardware";

}  // namespace lockstep::cuda
