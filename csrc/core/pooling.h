// Attention pooling by queries fixed beforehand: LayerNorm, logits, softmax and pooling in one pass over the tokens.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda {

// Running softmax of n queries: largest logit, sum of weights and weighted sum of normalised tokens of each.
struct PoolState {
  float* largest;  // [n]
  float* weight;   // [n]
  float* sum;      // [n][c]
};
constexpr int64_t pool_state_floats(int64_t n, int64_t c) { return n * (c + 2); }
inline PoolState pool_state(float* memory, int64_t n) { return {memory, memory + n, memory + 2 * n}; }

struct Pool {
  Dtype dtype;
  const float* queries;  // [n][c]
  int64_t n, c;
  float eps;
};

// Four kernels work on a state: pool_reset; pool_tokens adds `count` tokens, c apart; pool_merge adds another state;
// pool_finish writes z, [n][c], zero where no token came. The order and the extent of the calls fix the order of the
// sums, so a caller who wants one result whatever the number of threads cuts the tokens the same way each time.

constexpr int64_t kPoolTokens = 256;  // tokens of one partial sum; fixed, so that no batch changes a bit

// The gradient of one sample: its n queries and then the gradients of their results, 2n rows, with the sum of each row.
// Of each query's softmax the largest logit, the sum of the weights and the mean of what the weights' gradients are.
struct PoolGradient {
  Pool pool;          // n and queries are of the 2n rows
  const float* sums;  // [2n]
  const float* largest;
  const float* weight;
  const float* mean;
};

// Two kernels for at most kPoolTokens tokens: pool_dots writes their products with the 2n rows, [2n][kPoolTokens], and
// pool_gradient makes of these their gradients, and adds theirs, [n][c], to the queries'.

}  // namespace panda
