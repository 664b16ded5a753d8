// What the two kinds of products are asked for.
#pragma once

#include <cstdint>

namespace dsbert {

// Y = X W^T + bias at blocks of size B, or dX = dY W with the roles of rows and columns exchanged.
struct Product {
  const void* x;
  int64_t ldx;
  const void* blocks;
  const void* bias;  // or null
  void* y;
  void* activated;  // gelu(y), or null
  const int32_t *ptr, *slots, *groups;  // of the rows that are computed; groups: the summed side of every slot
  int64_t tokens, out_groups, in_groups;
  int B;
  bool transpose;
  int threads;
};

// dW = dY^T X at the active blocks.
struct Gradient {
  const void* dy;
  int64_t lddy;
  const void* x;
  int64_t ldx;
  void* dw;
  const int32_t *rows, *cols, *slots;  // slots in the order of rows
  int64_t active, tokens, out_groups, in_groups;
  int B, threads;
};

}  // namespace dsbert
