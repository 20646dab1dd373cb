// What kernels use of CUDA, under one name each, so that they compile in two ways: by nvcc for a device, and by any C++
// compiler for the tests, where cuda_emulation.h runs blocks and threads on the CPU. Whatever differs between the two
// is here or there, never in a kernel.
#pragma once
#include <cstddef>
#include <cstdint>

#include "types.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "cuda_emulation.h"
#endif

namespace panda::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void narrow(float x, bfloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ void narrow(float x, float16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// cp.async: 16 bytes to shared memory, zeros instead where `inside` is false; the pointer must be valid either way.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(inside ? 16 : 0));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until at most `pending` of this thread's committed groups are on their way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers out of shared memory: lane i gives the address of row i % 8 of matrix i / 8,
// and gets of each matrix row lane / 4, columns lane % 4 * 2 and the next; if transposed, of its transpose.
template <bool transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// c += a b of 16 x 16 and 16 x 8 numbers, a warp together; fragments as the PTX manual lays them out for m16n8k16.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                             bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Until every thread of a launch_together() is here; what they wrote can then be read.
__device__ __forceinline__ void wait_for_blocks() { cooperative_groups::this_grid().sync(); }

// The shared memory a block can have.
inline int largest_shared_memory(int& bytes) {
  int device;
  if (auto error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, void* stream,
           Arguments... arguments) {
  if (shared_bytes > 48 * 1024)
    if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)))
      return error;
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  return cudaGetLastError();
}

// All blocks at once, so that they can wait for one another: as many as the device holds, at most `wanted`, or one
// where it cannot tell. The kernel is given the number by gridDim.
template <class... Parameters, class... Arguments>
int launch_together(void (*kernel)(Parameters...), int wanted, int threads, size_t shared_bytes, void* stream,
                    Arguments... arguments) {
  int device, multiprocessors, resident;
  if (shared_bytes > 48 * 1024)
    if (auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)))
      return error;
  if (auto error = cudaGetDevice(&device)) return error;
  if (auto error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared_bytes))
    return error;
  const int fitting = multiprocessors * resident;
  void* pointers[] = {&arguments...};
  return cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(wanted < fitting ? wanted : fitting),
                                     dim3(threads), pointers, shared_bytes, static_cast<cudaStream_t>(stream));
}

#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ void narrow(float x, float& y) { y = x; }

// 16 bytes of numbers: what one load or store of a thread moves.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T numbers[size];
};

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <class T>
__device__ __forceinline__ void store_vector(T* to, const float (&numbers)[Vector<T>::size]) {
  Vector<T> vector;
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) narrow(numbers[i], vector.numbers[i]);
  *reinterpret_cast<Vector<T>*>(to) = vector;
}

// Calls use(T{}) with the type of `dtype`.
template <class Use>
int with_type(Dtype dtype, Use use) {
  switch (dtype) {
    case Dtype::bfloat16:
      return use(bfloat16{});
    case Dtype::float16:
      return use(float16{});
    default:
      return use(0.0f);
  }
}

}  // namespace panda::cuda
