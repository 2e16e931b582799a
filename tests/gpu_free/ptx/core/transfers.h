// SPDX-License-Identifier: Apache-2.0
// Loads, stores, atomic operations and cp.async (PTX ISA 9.7.9, 9.7.13).
#pragma once
#include "floats.h"
#include "memory.h"

namespace ptx {

// The address of a lane: memory operand number `operand` is source register `source`.
inline u64 address_of(Warp& w, const Instruction& in, int lane, int source, int operand) {
  return w.reg(in.src[source])[lane] + in.offset[operand];
}

template <class T>
void load_global(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  m.global.begin_load();
  for_lanes(mask, [&](int lane) {
    T values[16];
    const u64 address = address_of(w, in, lane, 0, 0);
    const u32 size = sizeof(T) * in.n_dst;
    check_aligned(address, size, "load");
    m.global.load(values, address, size, m.block_index);
    for (int i = 0; i < in.n_dst; i++)
      if (in.dst[i] >= 0)
        w.reg(in.dst[i])[lane] = to_slot(values[i]);
  });
}
template <class T>
void store_global(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    T values[16];
    const u64 address = address_of(w, in, lane, 0, 0);
    const u32 size = sizeof(T) * (in.n_src - 1);
    for (int i = 0; i + 1 < in.n_src; i++)
      values[i] = from_slot<T>(w.reg(in.src[i + 1])[lane]);
    check_aligned(address, size, "store");
    m.global.store(values, address, size, m.block_index);
  });
}
template <class T>
void load_shared(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  const Accessor by = m.accessor(w);
  for_lanes(mask, [&](int lane) {
    T values[16];
    m.shared.read(values, u32(address_of(w, in, lane, 0, 0)), sizeof(T) * in.n_dst, by);
    for (int i = 0; i < in.n_dst; i++)
      if (in.dst[i] >= 0)
        w.reg(in.dst[i])[lane] = to_slot(values[i]);
  });
}
template <class T>
void store_shared(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  const Accessor by = m.accessor(w);
  m.shared.begin_store();
  for_lanes(mask, [&](int lane) {
    T values[16];
    for (int i = 0; i + 1 < in.n_src; i++)
      values[i] = from_slot<T>(w.reg(in.src[i + 1])[lane]);
    m.shared.write(values, u32(address_of(w, in, lane, 0, 0)), sizeof(T) * (in.n_src - 1), by);
  });
}

// atom returns the value before, red nothing. Blocks run one after the other, so that every operation is atomic.
template <class T, auto Operation>
void atomic(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    u8* memory = m.global.atomic(address_of(w, in, lane, 0, 0), sizeof(T));
    T before;
    memcpy(&before, memory, sizeof(T));
    const T after = Operation(before, from_slot<T>(w.reg(in.src[1])[lane]));
    memcpy(memory, &after, sizeof(T));
    if (in.n_dst && in.dst[0] >= 0)
      w.reg(in.dst[0])[lane] = to_slot(before);
  });
}
template <class T>
void compare_and_swap(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    u8* memory = m.global.atomic(address_of(w, in, lane, 0, 0), sizeof(T));
    T before;
    memcpy(&before, memory, sizeof(T));
    if (before == from_slot<T>(w.reg(in.src[1])[lane])) {
      const T after = from_slot<T>(w.reg(in.src[2])[lane]);
      memcpy(memory, &after, sizeof(T));
    }
    w.reg(in.dst[0])[lane] = to_slot(before);
  });
}

// [shared], [global], size, bytes to read: the rest is filled with zeros. Global memory is read at once, shared memory
// holds NaN until the wait.
inline void copy_async(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  const Accessor by = m.accessor(w);
  for_lanes(mask, [&](int lane) {
    Copy copy{u32(address_of(w, in, lane, 0, 0)), u32(w.reg(in.src[2])[lane]), {}};
    const u32 valid = in.n_src > 3 ? u32(w.reg(in.src[3])[lane]) : copy.size;
    if (valid) {
      const u64 from = address_of(w, in, lane, 1, 1);
      check_aligned(from, copy.size, "asynchronous load");
      m.global.load(copy.data, from, valid, m.block_index);
    }
    m.shared.launch(copy.address, copy.size, by);
    w.open_copies.push_back(copy);
    m.counters.async_copies++;
  });
}
inline void commit_copies(Machine&, Warp& w, const Instruction&, Mask) {
  w.copy_groups.push_back(std::move(w.open_copies));
  w.open_copies.clear();
}
inline void wait_copies(Machine& m, Warp& w, size_t pending) {
  while (w.copy_groups.size() > pending) {
    for (const Copy& copy : w.copy_groups.front())
      m.shared.land(copy.data, copy.address, copy.size, m.accessor(w));
    w.copy_groups.pop_front();
  }
}
inline void wait_copy_groups(Machine& m, Warp& w, const Instruction& in, Mask) {
  wait_copies(m, w, w.reg(in.src[0])[0]);
}
inline void wait_all_copies(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  commit_copies(m, w, in, mask);
  wait_copies(m, w, 0);
}

// clang-format off
#define ACCESS(type, T) \
  {"ld.global." type, load_global<T>}, {"st.global." type, store_global<T>}, \
  {"ld.shared." type, load_shared<T>}, {"st.shared." type, store_shared<T>}

inline const Definition kTransfers[] = {
  ACCESS("b8", u8), ACCESS("b16", u16), ACCESS("b32", u32), ACCESS("b64", u64),
  {"ld.global.s8", load_global<s8>}, {"ld.global.s16", load_global<s16>}, {"ld.global.s32", load_global<s32>},
  {"ld.shared.s8", load_shared<s8>}, {"ld.shared.s16", load_shared<s16>}, {"ld.shared.s32", load_shared<s32>},
  {"atom.global.add.f32 red.global.add.f32", atomic<float, [](float a, float b) { return a + b; }>},
  {"atom.global.add.u32 atom.global.add.s32 red.global.add.u32 red.global.add.s32", atomic<u32, [](u32 a, u32 b) { return a + b; }>},
  {"atom.global.add.u64 red.global.add.u64", atomic<u64, [](u64 a, u64 b) { return a + b; }>},
  {"atom.global.max.s32 red.global.max.s32", atomic<s32, [](s32 a, s32 b) { return std::max(a, b); }>},
  {"atom.global.min.s32 red.global.min.s32", atomic<s32, [](s32 a, s32 b) { return std::min(a, b); }>},
  {"atom.global.exch.b32", atomic<u32, [](u32, u32 b) { return b; }>},
  {"atom.global.cas.b32", compare_and_swap<u32>}, {"atom.global.cas.b64", compare_and_swap<u64>},
  {"cp.async.ca.shared.global cp.async.cg.shared.global", copy_async},
  {"cp.async.commit_group", commit_copies},
  {"cp.async.wait_group", wait_copy_groups},
  {"cp.async.wait_all", wait_all_copies},
  {"prefetch.global.L1 prefetch.global.L2", [](Machine&, Warp&, const Instruction&, Mask) {}},
};
#undef ACCESS
// clang-format on

}  // namespace ptx
