// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together: shuffles, votes, reductions, matrix loads and mma (PTX ISA 9.7.9, 9.7.13, 9.7.14).
#pragma once
#include "floats.h"
#include "memory.h"

namespace ptx {

inline void require_full(Mask mask, const char* what) {
  if (mask != kFullWarp)
    throw Violation{std::string(what) + " with only some lanes of the warp: mask " + hex(mask)};
}
// Every lane that the instruction names must have come.
inline Mask members(Warp& w, s32 source, Mask mask, const char* what) {
  const Mask named = Mask(w.reg(source)[__builtin_ctz(mask)]);
  if (named & ~mask)
    throw Violation{std::string(what) + " names lanes " + hex(named) + " but only " + hex(mask) + " are here"};
  return named;
}

enum ShuffleMode { kUp, kDown, kButterfly, kIndex };

// d[|p], a, b, c, members. c holds the clamp in bits 0 to 4 and the segment's mask in bits 8 to 12.
template <ShuffleMode mode>
void shuffle(Machine&, Warp& w, const Instruction& in, Mask mask) {
  const Mask named = members(w, in.src[3], mask, "shfl.sync");
  u64 values[kLanes];
  memcpy(values, w.reg(in.src[0]), sizeof values);
  for_lanes(mask, [&](int lane) {
    const int b = w.reg(in.src[1])[lane] & 31, c = w.reg(in.src[2])[lane] & 31, segment = w.reg(in.src[2])[lane] >> 8 & 31;
    const int last = (lane & segment) | (c & ~segment), first = lane & segment;
    int from = mode == kUp     ? lane - b
               : mode == kDown ? lane + b
               : mode == kIndex ? first | (b & ~segment)
                                : lane ^ b;
    const bool inside = mode == kUp ? from >= last : from <= last;
    if (!inside)
      from = lane;
    if (!(named >> from & 1))
      throw Violation{"shfl.sync reads lane " + std::to_string(from) + ", which is no member"};
    if (in.dst[0] >= 0)
      w.reg(in.dst[0])[lane] = u32(values[from]);
    if (in.n_dst > 1 && in.dst[1] >= 0)
      w.reg(in.dst[1])[lane] = inside;
  });
}

template <class T, auto Operation>
void reduce(Machine&, Warp& w, const Instruction& in, Mask mask) {
  const Mask named = members(w, in.src[1], mask, "redux.sync");
  bool first = true;
  T total{};
  for_lanes(named, [&](int lane) {
    const T value = from_slot<T>(w.reg(in.src[0])[lane]);
    total = first ? value : Operation(total, value);
    first = false;
  });
  for_lanes(mask, [&](int lane) { w.reg(in.dst[0])[lane] = to_slot(total); });
}

enum VoteMode { kBallot, kAny, kAll };

template <VoteMode mode>
void vote(Machine&, Warp& w, const Instruction& in, Mask mask) {
  const Mask named = members(w, in.src[1], mask, "vote.sync");
  Mask ballot = 0;
  for_lanes(named, [&](int lane) { ballot |= Mask(w.reg(in.src[0])[lane] & 1) << lane; });
  const u32 result = mode == kBallot ? ballot : mode == kAny ? ballot != 0 : ballot == named;
  for_lanes(mask, [&](int lane) { w.reg(in.dst[0])[lane] = result; });
}

// d|p, members: one lane, the lowest here, is elected.
inline void elect(Machine&, Warp& w, const Instruction& in, Mask mask) {
  const int leader = __builtin_ctz(members(w, in.src[0], mask, "elect.sync"));
  for_lanes(mask, [&](int lane) {
    if (in.dst[0] >= 0)
      w.reg(in.dst[0])[lane] = leader;
    if (in.n_dst > 1 && in.dst[1] >= 0)
      w.reg(in.dst[1])[lane] = lane == leader;
  });
}

// Matrices of 8 x 8 halves: lane 8 j + r has the address of row r of matrix j. Lane l holds elements (l / 4, 2 (l % 4))
// and the next one of that row, or of the transposed matrix.
template <bool transposed>
void load_matrices(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  require_full(mask, "ldmatrix");
  const Accessor by = m.accessor(w);
  for (int j = 0; j < in.n_dst; j++) {
    u16 matrix[8][8];
    for (int row = 0; row < 8; row++)
      m.shared.read(matrix[row], u32(w.reg(in.src[0])[8 * j + row] + in.offset[0]), 16, by);
    for (int lane = 0; lane < kLanes; lane++) {
      const int row = lane / 4, column = lane % 4 * 2;
      const u16 low = transposed ? matrix[column][row] : matrix[row][column];
      const u16 high = transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      w.reg(in.dst[j])[lane] = low | u32(high) << 16;
    }
  }
}
template <bool transposed>
void store_matrices(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  require_full(mask, "stmatrix");
  const Accessor by = m.accessor(w);
  m.shared.begin_store();
  for (int j = 0; j + 1 < in.n_src; j++) {
    u16 matrix[8][8];
    for (int lane = 0; lane < kLanes; lane++) {
      const int row = lane / 4, column = lane % 4 * 2;
      const u32 value = u32(w.reg(in.src[j + 1])[lane]);
      (transposed ? matrix[column][row] : matrix[row][column]) = u16(value);
      (transposed ? matrix[column + 1][row] : matrix[row][column + 1]) = u16(value >> 16);
    }
    for (int row = 0; row < 8; row++)
      m.shared.write(matrix[row], u32(w.reg(in.src[0])[8 * j + row] + in.offset[0]), 16, by);
  }
}

// ---- mma: D = A B + C, A [16, K], B [K, 8]. Products and sums are exact but for one rounding at the end, where a tensor
// core truncates.

// A register's numbers: two halves, or one tf32 whose lower 13 bits are not read.
template <class T>
struct Packed {
  static constexpr int count = 2;
  static double get(u64 slot, int i) { return widen(T{u16(slot >> 16 * i)}); }
};
struct Tf32 {};
template <>
struct Packed<Tf32> {
  static constexpr int count = 1;
  static double get(u64 slot, int) { return from_slot<float>(slot & 0xffffe000u); }
};

// With g = lane / 4 and t = lane % 4, register r of A holds rows g + 8 (r % 2) and columns from count (t + 4 (r / 2)) on,
// register r of B rows from count (t + 4 r) on and column g; C and D have rows g and g + 8, columns 2 t and 2 t + 1.
template <class T, int K>
void multiply(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  require_full(mask, "mma");
  using P = Packed<T>;
  constexpr int b_registers = K / (4 * P::count), a_registers = 2 * b_registers;
  double a[16][K], b[K][8], c[16][8];
  for (int lane = 0; lane < kLanes; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < a_registers; r++)
      for (int i = 0; i < P::count; i++)
        a[g + 8 * (r % 2)][P::count * (t + 4 * (r / 2)) + i] = P::get(w.reg(in.src[r])[lane], i);
    for (int r = 0; r < b_registers; r++)
      for (int i = 0; i < P::count; i++)
        b[P::count * (t + 4 * r) + i][g] = P::get(w.reg(in.src[a_registers + r])[lane], i);
    for (int i = 0; i < 4; i++)
      c[g + 8 * (i / 2)][2 * t + i % 2] = from_slot<float>(w.reg(in.src[a_registers + b_registers + i])[lane]);
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < K; k++)
      for (int column = 0; column < 8; column++)
        c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kLanes; lane++)
    for (int i = 0; i < 4; i++)
      w.reg(in.dst[i])[lane] = to_slot(float(c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]));
  m.counters.mma++;
}

inline void nothing(Machine&, Warp&, const Instruction&, Mask) {}

// clang-format off
inline const Definition kWarpOperations[] = {
  {"shfl.up.b32", shuffle<kUp>}, {"shfl.down.b32", shuffle<kDown>}, {"shfl.bfly.b32", shuffle<kButterfly>},
  {"shfl.idx.b32", shuffle<kIndex>},
  {"redux.add.s32 redux.add.u32", reduce<u32, [](u32 a, u32 b) { return a + b; }>},
  {"redux.min.s32", reduce<s32, [](s32 a, s32 b) { return std::min(a, b); }>},
  {"redux.max.s32", reduce<s32, [](s32 a, s32 b) { return std::max(a, b); }>},
  {"redux.min.u32", reduce<u32, [](u32 a, u32 b) { return std::min(a, b); }>},
  {"redux.max.u32", reduce<u32, [](u32 a, u32 b) { return std::max(a, b); }>},
  {"redux.and.b32", reduce<u32, [](u32 a, u32 b) { return a & b; }>},
  {"redux.or.b32", reduce<u32, [](u32 a, u32 b) { return a | b; }>},
  {"redux.xor.b32", reduce<u32, [](u32 a, u32 b) { return a ^ b; }>},
  {"vote.ballot.b32", vote<kBallot>}, {"vote.any.pred", vote<kAny>}, {"vote.all.pred", vote<kAll>},
  {"elect", elect},
  {"ldmatrix.m8n8.x1.shared.b16 ldmatrix.m8n8.x2.shared.b16 ldmatrix.m8n8.x4.shared.b16", load_matrices<false>},
  {"ldmatrix.m8n8.x1.trans.shared.b16 ldmatrix.m8n8.x2.trans.shared.b16 ldmatrix.m8n8.x4.trans.shared.b16", load_matrices<true>},
  {"stmatrix.m8n8.x1.shared.b16 stmatrix.m8n8.x2.shared.b16 stmatrix.m8n8.x4.shared.b16", store_matrices<false>},
  {"stmatrix.m8n8.x1.trans.shared.b16 stmatrix.m8n8.x2.trans.shared.b16 stmatrix.m8n8.x4.trans.shared.b16", store_matrices<true>},
  {"mma.m16n8k16.row.col.f32.f16.f16.f32", multiply<Half, 16>},
  {"mma.m16n8k16.row.col.f32.bf16.bf16.f32", multiply<BFloat, 16>},
  {"mma.m16n8k8.row.col.f32.f16.f16.f32", multiply<Half, 8>},
  {"mma.m16n8k8.row.col.f32.bf16.bf16.f32", multiply<BFloat, 8>},
  {"mma.m16n8k8.row.col.f32.tf32.tf32.f32", multiply<Tf32, 8>},
  {"mma.m16n8k4.row.col.f32.tf32.tf32.f32", multiply<Tf32, 4>},
  // lanes run in lockstep, blocks one after the other: these order what is ordered anyway
  {"bar.warp membar.gl membar.cta fence.acq_rel.gpu fence.acq_rel.cta fence.sc.gpu nop nanosleep.u32 griddepcontrol.wait "
   "griddepcontrol.launch_dependents", nothing},
};
// clang-format on

}  // namespace ptx
