// SPDX-License-Identifier: Apache-2.0
// [prefix | keys] and [prefix | values] for another library's attention, and the prefix's gradient from that
// attention's.
#ifndef PEFTKERN_CUDA_CONCAT_H_
#define PEFTKERN_CUDA_CONCAT_H_

#include "chunks.cuh"

namespace peftkern {

struct Concat {
  Matrices from[2], prefix[2], to[2];  // keys and values
  Indices prefix_ids;
  int num_kv_heads, kv_len, prefix_len, chunks, prefix_is_float;
  int64_t count;  // chunks of to[0]
};

// to[b, h] = [prefix[prefix_ids[b], h] | from[b, h]], with zeros for id -1. grid: (chunks / kCopyThreads, 2)
template <class T>
PEFTKERN_KERNEL(kCopyThreads, 1)
concat(PEFTKERN_PARAMS Concat args) {
  const int64_t i = (int64_t)blockIdx.x * kCopyThreads + threadIdx.x;
  if (i >= args.count) return;
  const bool v = blockIdx.y != 0;
  const int column = (int)(i % args.chunks) * 8, length = args.prefix_len + args.kv_len;
  const int h = (int)(i / args.chunks % args.num_kv_heads), n = (int)(i / args.chunks / args.num_kv_heads % length);
  const int b = (int)(i / args.chunks / args.num_kv_heads / length);
  uint4 x = make_uint4(0, 0, 0, 0);
  if (n >= args.prefix_len) {
    x = *reinterpret_cast<const uint4*>((v ? args.from[1] : args.from[0]).template at<T>(b, h, n - args.prefix_len) +
                                        column);
  } else {
    const int id = args.prefix_ids.pointer ? args.prefix_ids[b] : 0;
    const Matrices& prefix = v ? args.prefix[1] : args.prefix[0];
    if (id >= 0)
      x = load_as<T>(prefix.pointer, id * prefix.batch + h * prefix.head + n * prefix.row + column,
                     args.prefix_is_float);
  }
  *reinterpret_cast<uint4*>((v ? args.to[1] : args.to[0]).template at<T>(b, h, n) + column) = x;
}

struct ConcatBackward {
  Matrices dout;
  float* dprefix;  // [bank, Hkv, P, D]
  Indices prefix_ids;
  int batch, num_kv_heads, prefix_len, chunks;
  int64_t count;  // chunks of dprefix
};

// dprefix[a, h, p] = the sum of dout[b, h, p] over the samples b of prefix a, in order
template <class T>
PEFTKERN_KERNEL(kCopyThreads, 1)
concat_backward(PEFTKERN_PARAMS ConcatBackward args) {
  const int64_t i = (int64_t)blockIdx.x * kCopyThreads + threadIdx.x;
  if (i >= args.count) return;
  const int column = (int)(i % args.chunks) * 8, p = (int)(i / args.chunks % args.prefix_len);
  const int h = (int)(i / args.chunks / args.prefix_len % args.num_kv_heads);
  const int a = (int)(i / args.chunks / args.prefix_len / args.num_kv_heads);
  float sum[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  for (int b = 0; b < args.batch; b++)
    if (!args.prefix_ids.pointer || args.prefix_ids[b] == a) add_chunk(sum, args.dout.at<T>(b, h, p) + column);
  store_chunk(args.dprefix + i * 8, sum);
}

}  // namespace peftkern
#endif  // PEFTKERN_CUDA_CONCAT_H_
