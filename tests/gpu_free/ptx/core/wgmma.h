// SPDX-License-Identifier: Apache-2.0
// wgmma.mma_async (PTX ISA 9.7.15): the tensor cores of sm_90, which read shared memory and registers on their own time.
//
// A warp computes its 16 of the 64 rows when it issues the instruction; what makes it asynchronous is checked:
// accumulators cannot be touched before wgmma.wait_group, registers that others changed need a wgmma.fence before, shared
// memory that the instruction reads may be overwritten only after the wait, and what was written to it through the generic
// proxy needs a fence.proxy.async.
#pragma once
#include "warp_ops.h"

namespace ptx {

// Before each other instruction, in a program that has wgmma.
inline void track_registers(Warp& w, const Instruction& in) {
  for (int i = 0; i < in.n_src; i++)
    if (in.src[i] >= 0 && w.accumulating[in.src[i]])
      throw Violation{"read of an accumulator of a wgmma that is not waited for"};
  w.clock++;
  for (int i = 0; i < in.n_dst; i++) {
    if (in.dst[i] < 0)
      continue;
    if (w.accumulating[in.dst[i]] || w.multiplying[in.dst[i]])
      throw Violation{"write to a register of a wgmma that is not waited for"};
    // PTX's registers are virtual: a copy, such as LLVM puts between fence and wgmma, is as old as what it copies
    const u64 age = in.is_copy ? w.written_at[in.src[0]] : 0;
    w.written_at[in.dst[i]] = age ? age : w.clock;
  }
}

// Where a matrix lies in shared memory (PTX ISA 9.7.15.5.1): start, leading and stride byte offsets, swizzle.
struct MatrixDescriptor {
  u32 start, leading, stride, width;  // width: bytes of a swizzled row, 16 without swizzle
  explicit MatrixDescriptor(u64 bits)
      : start(u32(bits & 0x3fff) << 4), leading(u32(bits >> 16 & 0x3fff) << 4), stride(u32(bits >> 32 & 0x3fff) << 4) {
    static constexpr u32 widths[] = {16, 128, 64, 32};
    width = widths[bits >> 62];
    if (bits >> 49 & 7)
      throw Violation{"wgmma descriptor with a base offset: not emulated"};
  }
  // The 16 bytes at row `major` and 16-byte piece `piece` along the contiguous dim, `piece` 0 or 1 where k is contiguous.
  u32 address(u32 row, u32 piece, bool k_contiguous) const {
    u32 offset;
    if (k_contiguous)  // rows of M or N, in groups of 8
      offset = row % 8 * width + row / 8 * stride + (width == 16 ? piece * leading : piece * 16);
    else if (width == 16)  // rows of k
      offset = row % 8 * 16 + row / 8 * leading + piece * stride;
    else
      offset = row % 8 * width + row / 8 * stride + piece % (width / 16) * 16 + piece / (width / 16) * leading;
    const u32 plain = start + offset;
    return plain ^ ((plain >> 7 & (width / 16 - 1)) << 4);  // the swizzle is one of addresses
  }
};

// [rows, 16] of A or of B transposed, as doubles: rows from `first` on.
template <class T>
void read_operand(Machine& m, const Warp& w, const MatrixDescriptor& matrix, u32 first, u32 rows, bool k_contiguous,
                  double (*into)[16]) {
  const Accessor by{m.wgmma_agent(w), w.wgmma_step, &w.seen};
  T piece[8];
  auto fetch = [&](u32 row, u32 number) {
    const u32 address = matrix.address(row, number, k_contiguous);
    m.shared.read(piece, address, 16, by);
    m.shared.require_fenced(address, 16, w.fenced, int(m.warps.size()));
  };
  if (k_contiguous)
    for (u32 row = 0; row < rows; row++)
      for (u32 half = 0; half < 2; half++) {
        fetch(first + row, half);
        for (int i = 0; i < 8; i++)
          into[row][8 * half + i] = widen(piece[i]);
      }
  else
    for (u32 k = 0; k < 16; k++)
      for (u32 row = 0; row < rows; row += 8) {
        fetch(k, (first + row) / 8);
        for (int i = 0; i < 8; i++)
          into[row + i][k] = widen(piece[i]);
      }
}

// {d}, a descriptor or {a}, b descriptor, scale-d, scale-a, scale-b, [transpose-a,] transpose-b
template <class T>
void multiply_async(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  require_full(mask, "wgmma");
  static thread_local double a[16][16], b[256][16];
  const u32 columns = u32(in.n_dst) * 2;
  const bool a_in_registers = in.n_src == 9;
  const s32* rest = in.src + (a_in_registers ? 4 : 1);
  auto value = [&](int i) { return w.reg(rest[i])[0]; };
  auto require_settled = [&](s32 r, const char* what) {
    if (w.written_at[r] > w.wgmma_fence)
      throw Violation{std::string("wgmma uses a register that ") + what + " without a wgmma.fence in between"};
  };
  if (a_in_registers) {
    for (int lane = 0; lane < kLanes; lane++)
      for (int r = 0; r < 4; r++)
        for (int i = 0; i < 2; i++)
          a[lane / 4 + 8 * (r % 2)][2 * (lane % 4 + 4 * (r / 2)) + i] = Packed<T>::get(w.reg(in.src[r])[lane], i);
    for (int r = 0; r < 4; r++) {
      require_settled(in.src[r], "was written");
      w.multiplying[in.src[r]]++;
      w.open_operands.push_back(in.src[r]);
    }
  } else {
    const bool transposed = w.reg(in.src[5])[0];
    read_operand<T>(m, w, MatrixDescriptor(w.reg(in.src[0])[0]), w.index % 4 * 16, 16, !transposed, a);
  }
  const bool b_transposed = w.reg(in.src[in.n_src - 1])[0];
  read_operand<T>(m, w, MatrixDescriptor(value(0)), 0, columns, !b_transposed, b);
  const bool accumulate = value(1) & 1;
  const double sign = s32(value(2)) * s32(value(3));
  for (int r = 0; r < in.n_dst; r++) {
    require_settled(in.dst[r], "was written");
    for (int lane = 0; lane < kLanes; lane++) {
      const int row = lane / 4 + 8 * (r / 2 % 2), column = 8 * (r / 4) + 2 * (lane % 4) + r % 2;
      double sum = accumulate ? from_slot<float>(w.reg(in.dst[r])[lane]) : 0.;
      for (int k = 0; k < 16; k++)
        sum += sign * a[row][k] * b[column][k];
      w.reg(in.dst[r])[lane] = to_slot(float(sum));
    }
    w.accumulating[in.dst[r]]++;
    w.open_accumulators.push_back(in.dst[r]);
  }
  m.counters.mma++;
}

inline void fence_registers(Machine&, Warp& w, const Instruction&, Mask) { w.wgmma_fence = w.clock; }

inline void commit_wgmma(Machine&, Warp& w, const Instruction&, Mask) {
  w.wgmma_groups.push_back({w.open_accumulators, w.open_operands, w.wgmma_step++});
  w.open_accumulators.clear();
  w.open_operands.clear();
}
inline void wait_wgmma(Machine& m, Warp& w, const Instruction& in, Mask) {
  while (w.wgmma_groups.size() > w.reg(in.src[0])[0]) {
    const WgmmaGroup& done = w.wgmma_groups.front();
    for (s32 r : done.accumulators)
      w.accumulating[r]--;
    for (s32 r : done.operands)
      w.multiplying[r]--;
    w.seen[m.wgmma_agent(w)] = done.step;
    w.wgmma_groups.pop_front();
  }
}

// Whatever happened before becomes visible to the asynchronous units; what this warp writes next does not.
inline void fence_proxy(Machine&, Warp& w, const Instruction&, Mask) {
  join(w.fenced, w.seen);
  release(w);
}

// clang-format off
#define SHAPES(n) "wgmma.mma_async.m64n" n "k16.f32."
#define EVERY_SHAPE(types) \
  SHAPES("8") types " " SHAPES("16") types " " SHAPES("24") types " " SHAPES("32") types " " SHAPES("40") types " " \
  SHAPES("48") types " " SHAPES("64") types " " SHAPES("80") types " " SHAPES("96") types " " SHAPES("128") types " " \
  SHAPES("160") types " " SHAPES("192") types " " SHAPES("256") types
inline const Definition kWgmma[] = {
  {EVERY_SHAPE("f16.f16"), multiply_async<Half>},
  {EVERY_SHAPE("bf16.bf16"), multiply_async<BFloat>},
  {"wgmma.fence", fence_registers},
  {"wgmma.commit_group", commit_wgmma},
  {"wgmma.wait_group", wait_wgmma},
  {"fence.proxy.async fence.proxy.async.shared", fence_proxy},
};
#undef SHAPES
#undef EVERY_SHAPE
// clang-format on

}  // namespace ptx
