// What surrounds the products of local spatial downsampling: the window's tokens before them, its attention between.
#pragma once
#include <cstdint>

#include "types.h"

namespace panda {

// A window has `size` tokens. Token j of window m is tokens[m * size + j], plus added[m * size + j] where that is not
// null. For each window in [first, last): its normalised tokens, their mean before normalisation, and the
// mean normalised. Rows of xhat and query are `stride` apart and zero beyond c.
struct WindowTokens {
  Dtype dtype;
  const void* const* tokens;
  const void* const* added;
  int64_t size, c, stride;
  float eps;
  void* xhat;   // [m][size][stride]
  float* mean;  // [m][c]
  void* query;  // [m][stride]
};

// The same of windows whose tokens are embedded patches E p, without their embedding: all that attention wants of it is
// linear in p but the deviation, and that is the length of R p over sqrt(c), where QR is E less the mean of its rows.
struct PatchWindows {
  Dtype dtype;
  const void* patches;       // rows `stride` apart
  const float* coordinates;  // [patches][rank], R p
  const int64_t* places;     // [m][size]: which patches
  int64_t size, k, stride, rank, c;
  float eps;
  void* xhat;   // [m][size][stride], patches by the reciprocal deviation of what they embed to
  void* mean;   // [m][stride]
  void* query;  // [m][stride], the mean by its reciprocal deviation
};

// One head over windows [first, last): z[m] = sum_j softmax_j(u[m] . xhat[m][j]) xhat[m][j]. Windows are numbered from
// `first` in u and z, which hold one block of them, and from 0 in xhat.
struct WindowAttention {
  Dtype dtype;
  const float* u;    // [m - first][c], the query folded into the keys
  const void* xhat;  // [m][size][stride]
  void* z;           // [m - first][stride]
  int64_t size, c, stride;
};

// One head's part in the gradient: from u and grad_z, that of z, what z was, the gradient of u, and of xhat, to which
// it is added or, by the first head, written. Numbered as in WindowAttention.
struct WindowGradient {
  Dtype dtype;
  const float* u;
  const float* grad_z;  // [m - first][c]
  const void* xhat;
  void* z;
  void* grad_u;      // [m - first][stride]
  float* grad_xhat;  // [m][size][c]
  bool add;
  int64_t size, c, stride;
};

// Through the norms of WindowTokens and the mean, which the result is also added to: places[m * size + j] receives the
// gradient of tokens[m * size + j].
struct WindowTokensGradient {
  Dtype dtype;
  const void* const* tokens;
  const void* const* added;
  const void* grad;        // [m][c], of the result
  const float* mean;       // [m][c]
  const float* grad_mean;  // [m][c], of the mean normalised
  const float* grad_xhat;
  void* const* places;
  int64_t size, c;
  float eps;
};

}  // namespace panda
