// A named stretch of a thread's work, as profilers of GPUs show it (NVTX). Ranges of a thread lie within each other.
// Which functions begin and end one, the back end says: cuda/range.cpp, and cuda/none.cpp, where it is nothing.
#pragma once

#include <string>

namespace lockstep {

class Range {
 public:
  explicit Range(const std::string& name) { begin(name.c_str()); }
  ~Range() { end(); }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  static void begin(const char* name);
  static void end();
};

}  // namespace lockstep
