// Which instruction set runs: the best one that the CPU has and that passes its self-check, or the one asked for.
#include <cpuid.h>
#include <immintrin.h>

#include <cstring>
#include <iterator>
#include <string>

#include "core/error.h"
#include "kernels/ceiling.h"
#include "kernels/kernels.h"

namespace lockstep::kernels {

namespace avx2 {
const Kernels& table();
const Ceiling& ceiling();
bool selfCheck();
}  // namespace avx2
namespace avx512 {
const Kernels& table();
const Ceiling& ceiling();
bool selfCheck();
}  // namespace avx512
namespace avx512_bf16 {
const Kernels& table();
const Ceiling& ceiling();
bool selfCheck();
}  // namespace avx512_bf16

namespace {

// __builtin_cpu_supports also checks that the operating system saves the registers.
bool hasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool hasAvx512() {
  return hasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool hasAvx512BFloat16() {
  unsigned int a = 0, b = 0, c = 0, d = 0;
  return hasAvx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 5)) != 0;
}

struct Candidate {
  const char* name;
  const char* needs;  // besides what the sets below it need
  bool (*present)();
  bool (*selfCheck)();
  const Kernels& (*table)();
  const Ceiling& (*ceiling)();
};

// Best first.
const Candidate kCandidates[] = {
    {"avx512-bf16", "AVX512-BF16", hasAvx512BFloat16, avx512_bf16::selfCheck, avx512_bf16::table, avx512_bf16::ceiling},
    {"avx512", "AVX-512 F, BW, DQ and VL", hasAvx512, avx512::selfCheck, avx512::table, avx512::ceiling},
    {"avx2", "AVX2 and FMA", hasAvx2, avx2::selfCheck, avx2::table, avx2::ceiling},
};

// What a CPU without `candidate` lacks, the simplest thing first.
std::string lacking(const Candidate& candidate) {
  std::string names;
  const auto count = std::size(kCandidates);
  for (size_t i = count; i-- > 0;) {
    if (!kCandidates[i].present()) names += (names.empty() ? "" : " and ") + std::string(kCandidates[i].needs);
    if (&kCandidates[i] == &candidate) break;
  }
  return names;
}

}  // namespace

const Kernels& cpuKernels(const char* isa) {
  for (const Candidate& candidate : kCandidates) {
    const bool asked = std::strcmp(isa, candidate.name) == 0;
    if (!asked && isa[0] != '\0') continue;
    const bool usable = candidate.present() && candidate.selfCheck();
    if (usable) return candidate.table();
    if (asked) {
      throw Error("ISA_UNSUPPORTED", "LOCKSTEP_ISA=" + std::string(isa) +
                                         (candidate.present() ? ": its arithmetic fails the self-check on this CPU"
                                                              : ": this CPU lacks " + lacking(candidate)) +
                                         "; unset it to use the best instruction set there is");
    }
  }
  if (isa[0] != '\0')
    throw Error("ISA_UNSUPPORTED",
                "unknown instruction set '" + std::string(isa) + "'; expected avx2, avx512 or avx512-bf16");
  throw Error("ISA_UNSUPPORTED", "this CPU lacks AVX2 and FMA, which Lockstep needs");
}

const Ceiling& ceilingOf(const Kernels& kernels) {
  for (const Candidate& candidate : kCandidates) {
    if (std::strcmp(candidate.name, kernels.name) == 0) return candidate.ceiling();
  }
  if (std::strcmp(kernels.name, "cuda") == 0) return *cudaCeiling();
  throw Error("BENCH_REFERENCE",
              "the reference kernels have no ceiling to be measured against; use those of the CPU or of a GPU");
}

}  // namespace lockstep::kernels
