// SPDX-License-Identifier: Apache-2.0
// Small kernels for tests of the shim itself: single instructions, and each kind of mistake that it must name.
#include "../../../csrc/cuda/launch/launch.h"

using namespace peftkern;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Instruction {
  const uint32_t *a, *b;
  uint32_t* out;
};

template <class T>
void mma_kernel(const Instruction p) {
  const int lane = threadIdx.x;
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = p.a[lane * 4 + i], d[i] = 0.f;
  mma<T>(d, a, p.b[lane * 2], p.b[lane * 2 + 1]);
  memcpy(p.out + lane * 4, d, 16);
}

// a: 32 rows of 16 bytes, of which lane l gives row l's address
template <bool kTransposed>
void load_matrices_kernel(const Instruction p) {
  PEFTKERN_SHARED(shared);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; i++) reinterpret_cast<uint32_t*>(shared)[lane * 4 + i] = p.a[lane * 4 + i];
  __syncthreads();
  uint32_t r[4];
  const uint32_t address = shared_address(shared) + lane * 16;
  if (kTransposed)
    load_matrices_transposed(r, address);
  else
    load_matrices(r, address);
  for (int i = 0; i < 4; i++) p.out[lane * 4 + i] = r[i];
}

template <class T>
void convert_kernel(const Instruction p) {
  const float* pair = reinterpret_cast<const float*>(p.a) + threadIdx.x * 2;
  p.out[threadIdx.x] = pack<T>(pair[0], pair[1]);
}

void exchange_kernel(const Instruction p) { p.out[threadIdx.x] = exchange_lanes(p.a[threadIdx.x], 5); }

struct Mistake {
  int kind;
  const float* in;
  float* out;
};

// Two warps. Each kind is a mistake but for the even ones, which do the same right.
void mistake_kernel(const Mistake p) {
  PEFTKERN_SHARED(shared);
  float* const x = reinterpret_cast<float*>(shared);
  const int i = threadIdx.x;
  switch (p.kind) {
    case 0:  // a barrier between write and read
    case 1:  // none
      x[i] = (float)i;
      if (p.kind == 0) __syncthreads();
      p.out[i] = x[i ^ 32];
      break;
    case 2:  // a barrier of the warp is enough within it
    case 3:  // and not across warps
      x[i] = (float)i;
      __syncwarp();
      p.out[i] = x[p.kind == 2 ? i ^ 1 : i ^ 32];
      break;
    case 4:  // write after read, in order
    case 5:
      x[i] = (float)i;
      __syncthreads();
      p.out[i] = x[i ^ 32];
      if (p.kind == 4) __syncthreads();
      x[i] = 0.f;
      break;
    case 6:  // waits for its copy
    case 7:
      copy_async(shared_address(shared) + i * 16, p.in + i * 4, true);
      copy_async_commit();
      if (p.kind == 6) copy_async_wait<0>();
      p.out[i] = x[i * 4];
      copy_async_wait<0>();
      break;
    case 8:  // the last copies are waited for
    case 9:
      copy_async(shared_address(shared) + i * 16, p.in + i * 4, true);
      copy_async_commit();
      if (p.kind == 8) copy_async_wait<0>();
      break;
    case 10:
    case 11:  // read of what nobody wrote
      if (p.kind == 10) x[i] = 1.f;
      p.out[i] = x[i];
      break;
    case 12:
    case 13:  // shared memory beyond its end
      x[p.kind == 12 ? i : i + 1024] = 1.f;
      break;
    case 14:
    case 15:  // global memory beyond its end
      p.out[p.kind == 14 ? i : i + 64] = 1.f;
      break;
    case 16:
    case 17:  // write to an input
      (p.kind == 16 ? p.out : const_cast<float*>(p.in))[i] = 1.f;
      break;
    case 18:
    case 19:  // all threads come to a barrier, or half of them
      if (p.kind == 18 || i < 32) __syncthreads();
      break;
    case 20:
    case 21:  // lanes of a warp at different instructions
      if (p.kind == 20 || i % 2 == 0)
        exchange_lanes(1.f, 1);
      else
        __syncwarp();
      break;
    case 22:  // blocks that write apart
    case 23:  // or to the same place
      if (i < 32) p.out[(p.kind == 22 ? blockIdx.x * 32 : 0) + i] = 1.f;
      break;
    case 24:
    case 25:  // a 16-byte load that is not aligned
      if (i == 0) *reinterpret_cast<float4*>(p.out) = *reinterpret_cast<const float4*>(p.in + (p.kind == 24 ? 4 : 1));
      break;
    case 26:
    case 27:  // read of an output before it is written
      if (p.kind == 26) p.out[i] = 0.f;
      p.out[i] += 1.f;
      break;
  }
}

}  // namespace

// kind: 0, 1 mma of fp16, bf16; 2, 3 ldmatrix, transposed; 4, 5 conversion; 6 shuffle
EXPORT int probe_instruction(int kind, const uint32_t* a, const uint32_t* b, uint32_t* out) {
  void (*const kernels[])(Instruction) = {
      mma_kernel<fp16>,     mma_kernel<bf16>,     load_matrices_kernel<false>, load_matrices_kernel<true>,
      convert_kernel<fp16>, convert_kernel<bf16>, exchange_kernel};
  Launcher launcher(0, nullptr);
  launcher.launch(kernels[kind], 1, 1, 1, 32, 512, Instruction{a, b, out});
  return launcher.status();
}

EXPORT int probe_mistake(int kind, const float* in, float* out) {
  Launcher launcher(0, nullptr);
  launcher.launch(mistake_kernel, kind / 2 == 11 ? 2 : 1, 1, 1, 64, 1024, Mistake{kind, in, out});
  return launcher.status();
}

// The tiles of 16 rows that a walk visits: writes the first position (its sample, if not packed) and the tile of each to
// `out`, and returns their number. A negative `step` asks for the upper bound of the numbers of tiles alone.
EXPORT int probe_walk(const int32_t* cu_seqlens, const int32_t* prefix_ids, int sequences, int q_len, int group, int only,
                      int first, int end, int step, int* out) {
  Call call{};
  call.batch = cu_seqlens ? 1 : sequences, call.sequences = sequences, call.q_len = call.length = q_len, call.group = group;
  call.cu_seqlens.pointer = cu_seqlens, call.prefix_ids.pointer = prefix_ids;
  if (step < 0) return row_tiles<16>(call).count();
  int count = 0;
  for (TileWalk<16> walk(call, only, first, end, step); walk.more(); walk.advance()) {
    out[2 * count] = cu_seqlens ? walk.sequence.first : walk.sequence.batch;
    out[2 * count++ + 1] = walk.tile;
  }
  return count;
}
