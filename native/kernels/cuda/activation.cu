// Backward of SwiGLU (Shazeer, 2020) and of the tanh form of GELU (Hendrycks and Gimpel, 2016): an element of
// dActivated gives one element of dSaved, or a gate's and an up's. A block takes a segment of a row.
#include "kernels/cuda/product.h"

namespace lockstep::kernels::cuda {

namespace {

constexpr int kThreads = 256, kEach = 4, kColumns = kThreads * kEach;

__global__ void geluBackwardKernel(Operand saved, View<const float> dActivated, Operand dSaved, unsigned perRow) {
  const int64_t t = blockIdx.x / perRow, first = static_cast<int64_t>(blockIdx.x % perRow) * kColumns + threadIdx.x;
  for (int i = 0; i < kEach; ++i) {
    const int64_t n = first + i * kThreads;
    if (n < dActivated.cols) store(dSaved, t, n, dActivated.row(t)[n] * geluTanhDerivative(load(saved, t, n)));
  }
}

__global__ void swiGluBackwardKernel(Parts parts, Operand saved, View<const float> dActivated, Operand dSaved,
                                     unsigned perRow) {
  const int64_t t = blockIdx.x / perRow, first = static_cast<int64_t>(blockIdx.x % perRow) * kColumns + threadIdx.x;
  for (int i = 0; i < kEach; ++i) {
    const int64_t n = first + i * kThreads;
    if (n >= dActivated.cols) return;
    int p = 0;
    while (2 * n >= parts[p].outBegin + parts[p].out) ++p;
    const Part part = parts[p];
    const int64_t gateColumn = part.outBegin / 2 + n, upColumn = gateColumn + part.out / 2;
    const float gate = load(saved, t, gateColumn), up = load(saved, t, upColumn), d = dActivated.row(t)[n];
    store(dSaved, t, gateColumn, d * up * siluDerivative(gate));
    store(dSaved, t, upColumn, d * silu(gate));
  }
}

}  // namespace

void activationBackward(Queue& queue, Activation activation, const WeightLayout& up, Operand saved,
                        View<const float> dActivated, Operand dSaved) {
  if (dActivated.rows == 0 || dActivated.cols == 0) return;
  const unsigned perRow = blocksFor(dActivated.cols, kColumns);
  const unsigned blocks = perRow * static_cast<unsigned>(dActivated.rows);
  cudaStream_t const stream = onGpu(queue).stream();
  if (activation == Activation::kGeluTanh)
    launch(geluBackwardKernel, blocks, kThreads, 0, stream, saved, dActivated, dSaved, perRow);
  else
    launch(swiGluBackwardKernel, blocks, kThreads, 0, stream, partsOf(queue, up), saved, dActivated, dSaved, perRow);
}

}  // namespace lockstep::kernels::cuda
