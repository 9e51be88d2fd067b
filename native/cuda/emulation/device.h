// The primitives kernels are written with, emulated. hardware/device.h has the same names; the include path chooses.
#pragma once

#include <cuda_runtime.h>

#include "core/dtype.h"
#include "core/error.h"
#include "cuda/recording.h"
#include "cuda/emulation/machine.h"

// Shared memory: `__shared__ Shared<float[32]> partial;`, or the launch's dynamic bytes as T.
template <class T>
struct Shared {
  T* const of[2] = {static_cast<T*>(emulated::allocate(sizeof(T))), static_cast<T*>(emulated::allocate(sizeof(T)))};
  Shared() { emulated::machine.static_shared.push_back({{of[0], of[1]}, sizeof(T)}); }
  operator T&() const { return *of[emulated::machine.number]; }
};
template <class T>
T* shared_memory() {
  return static_cast<T*>(emulated::machine.now->shared.get());
}

// Copies 16 bytes from global to shared memory, or zeros when not `valid`; both aligned to 16. The hardware may do so
// at any time until the wait. Here: at the wait (forward; what is read too early is not there), at once (reverse; what
// is overwritten too early is gone), or either (random).
inline void cp_async_16(void* to, const void* from, bool valid = true) {
  auto& machine = emulated::machine;
  if (reinterpret_cast<std::uintptr_t>(to) % 16 || (valid && reinterpret_cast<std::uintptr_t>(from) % 16))
    emulated::fail("cp_async_16: misaligned address");
  const emulated::Copy copy{to, valid ? from : nullptr, machine.self->copy_group};
  if (machine.schedule == emulated::Schedule::forward || emulated::chance(2))
    machine.self->copies.push_back(copy);
  else
    emulated::perform(copy);
}
inline void cp_async_commit() {
  emulated::machine.self->copy_group++;
}
// Waits until at most `Left` committed groups of this thread are in flight.
template <unsigned Left>
void cp_async_wait() {
  auto& fiber = *emulated::machine.self;
  std::erase_if(fiber.copies, [&](const emulated::Copy& copy) {
    if (copy.group + Left >= fiber.copy_group) return false;
    return emulated::perform(copy), true;
  });
}

// d[16x8] += a[16x16] b[16x8] of bfloat16 in float32; a row-major, b column-major. With row = lane / 4 and pair =
// lane % 4: a[i] holds elements (row + i % 2 * 8, 2 pair + i / 2 * 8 + {0, 1}), b[i] (2 pair + i * 8 + {0, 1}, row),
// d[i] (row + i / 2 * 8, 2 pair + i % 2); the first element of a pair in the lower half. Here it sums as kernels.h
// says: over k ascending, pair by pair, odd element first, one fused multiply-add each. Tensor cores round otherwise.
inline void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], CALL_SITE) {
  struct Record {
    float* d;
    const unsigned *a, *b;
  } mine{d, a, b};
  emulated::meet(
      ~0u, mine,
      [](auto& lanes) {
        const auto low = [](unsigned pair) { return std::bit_cast<float>(pair << 16); };
        const auto high = [](unsigned pair) { return std::bit_cast<float>(pair & 0xffff0000u); };
        float a[16][16], b[16][8], d[16][8];  // [m][k], [k][n], [m][n]
        for (int lane = 0; lane < 32; lane++) {
          const int row = lane / 4, column = lane % 4 * 2;
          const auto& from = *lanes[lane];
          for (int i = 0; i < 4; i++) {
            float* to = &a[row + i % 2 * 8][column + i / 2 * 8];
            to[0] = low(from.a[i]), to[1] = high(from.a[i]);
            d[row + i / 2 * 8][column + i % 2] = from.d[i];
          }
          for (int i = 0; i < 2; i++)
            b[column + i * 8][row] = low(from.b[i]), b[column + i * 8 + 1][row] = high(from.b[i]);
        }
        for (int m = 0; m < 16; m++) {
          __m256 sum = _mm256_loadu_ps(d[m]);
          for (int k = 0; k < 16; k += 2) {
            sum = _mm256_fmadd_ps(_mm256_set1_ps(a[m][k + 1]), _mm256_loadu_ps(b[k + 1]), sum);
            sum = _mm256_fmadd_ps(_mm256_set1_ps(a[m][k]), _mm256_loadu_ps(b[k]), sum);
          }
          _mm256_storeu_ps(d[m], sum);
        }
        for (int i = 0; i < 128; i++) lanes[i / 4]->d[i % 4] = d[i / 16 + i / 2 % 2 * 8][i / 4 % 4 * 2 + i % 2];
      },
      "mma_m16n8k16_bf16", where);
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...). Throws Error("CUDA_FAILED").
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A... arguments) {
  if (!lockstep::cuda::admit({reinterpret_cast<const void*>(kernel),
                              {grid.x, grid.y, grid.z},
                              uint64_t{block.x} * block.y * block.z,
                              shared_bytes}))
    return;
  const cudaError_t error = emulated::enqueue(
      stream, [=] { emulated::run_grid(grid, block, shared_bytes, [=] { kernel(static_cast<P>(arguments)...); }); });
  if (error != cudaSuccess) throw lockstep::Error("CUDA_FAILED", cudaGetErrorString(error));
}
