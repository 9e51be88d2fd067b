// The type of one operation of `Kernels`, so that an implementation declares it without repeating its parameters.
#pragma once

#include <type_traits>

#include "kernels/kernels.h"

namespace lockstep::kernels {

template <class T>
T fieldType(T Kernels::*);

// Op<&Kernels::linear> linear;  declares  void linear(Queue&, Operand x, const Weight&, const float* bias, Output y);
template <auto field>
using Op = std::remove_pointer_t<decltype(fieldType(field))>;

}  // namespace lockstep::kernels
