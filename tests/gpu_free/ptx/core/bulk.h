// SPDX-License-Identifier: Apache-2.0
// mbarrier and the tensor memory accelerator (PTX ISA 9.7.9.27, 9.7.13.15): bulk copies of tiles by a tensor map.
//
// A load reads global memory when it is issued and lands in shared memory at some later turn, drawn at random; until then
// its target counts as in flight. Its mbarrier hands on what happened before, as bar.sync does. Only one block clusters.
#pragma once
#include "memory.h"

namespace ptx {

inline MBarrier& mbarrier_at(Machine& m, u32 address) {
  const auto found = m.mbarriers.find(address);
  if (found == m.mbarriers.end())
    throw Violation{"no mbarrier was initialised at " + hex(address)};
  return found->second;
}
inline void settle(MBarrier& b) {
  if (b.pending || b.transactions)
    return;
  b.phase ^= 1;
  b.pending = b.expected;
  b.acquired = b.released;
  b.acquired_fenced = b.released_fenced;
}

inline void init_mbarrier(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    MBarrier b;
    b.expected = b.pending = u32(w.reg(in.src[1])[lane]);
    b.released.assign(m.agents(), 0);
    b.released_fenced = b.acquired = b.acquired_fenced = b.released;
    m.mbarriers[u32(w.reg(in.src[0])[lane] + in.offset[0])] = b;
  });
}
inline void drop_mbarrier(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    const u32 address = u32(w.reg(in.src[0])[lane] + in.offset[0]);
    mbarrier_at(m, address);
    m.mbarriers.erase(address);
  });
}
// _, [mbarrier] (, bytes to expect | , count)
template <bool expects, bool arrives>
void arrive_mbarrier(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    MBarrier& b = mbarrier_at(m, u32(w.reg(in.src[0])[lane] + in.offset[0]));
    const u32 number = in.n_src > 1 ? u32(w.reg(in.src[1])[lane]) : 1;
    if (expects)
      b.transactions += number;
    join(b.released, w.seen);
    join(b.released_fenced, w.fenced);
    if (arrives) {
      const u32 count = expects ? 1 : number;
      if (count > b.pending)
        throw Violation{"more arrivals at an mbarrier than it expects"};
      b.pending -= count;
      settle(b);
    }
  });
  release(w);
}
// p, [mbarrier], parity: has the phase of that parity completed? If not, others get their turn.
inline void try_mbarrier(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    const MBarrier& b = mbarrier_at(m, u32(w.reg(in.src[0])[lane] + in.offset[0]));
    const bool done = b.phase != (w.reg(in.src[1])[lane] & 1);
    w.reg(in.dst[0])[lane] = done;
    if (done) {
      join(w.seen, b.acquired);
      join(w.fenced, b.acquired_fenced);
    }
    w.yields |= !done;
  });
}

// Calls body(address in shared memory, address in global memory or 0 outside of the tensor, bytes) for pieces of at most
// 16 bytes of the tile at `coordinates`.
template <class F>
void for_tile(const TensorMap& map, u32 shared, const s64* coordinates, F body) {
  const u32 row_bytes = map.box[0] * map.element, piece = std::min<u32>(16, row_bytes);
  u32 rows = 1;
  for (int d = 1; d < map.rank; d++)
    rows *= map.box[d];
  static constexpr u32 bits[] = {0, 1, 3, 7};  // 16-byte columns that the swizzle of 32, 64, 128 bytes mixes
  for (u32 row = 0; row < rows; row++) {
    u64 address = map.base;
    bool inside = true;
    for (u32 d = 1, rest = row; d < u32(map.rank); rest /= map.box[d], d++) {
      const s64 at = coordinates[d] + s64(rest % map.box[d]);
      inside &= at >= 0 && at < map.size[d];
      address += at * map.stride[d];
    }
    for (u32 byte = 0; byte < row_bytes; byte += piece) {
      const u32 plain = shared + row * row_bytes + byte;
      const u32 place = plain ^ ((plain >> 7 & bits[map.swizzle]) << 4);
      for (u32 i = 0; i < piece; i += map.element) {
        const s64 column = coordinates[0] + s64((byte + i) / map.element);
        body(place + i, inside && column >= 0 && column < map.size[0] ? address + column * map.element : 0, map.element);
      }
    }
  }
}

inline const TensorMap& tensor_map(Machine& m, u64 handle) {
  if (handle >= m.tensor_maps.size())
    throw Violation{"a bulk copy by something that is no tensor map: " + hex(handle)};
  return m.tensor_maps[handle];
}

// [shared], [map, {coordinates}], [mbarrier]
template <int rank>
void load_tile(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    const TensorMap& map = tensor_map(m, w.reg(in.src[1])[lane]);
    s64 coordinates[rank];
    for (int d = 0; d < rank; d++)
      coordinates[d] = s32(w.reg(in.src[2 + d])[lane]);
    BulkCopy copy;
    copy.barrier = u32(w.reg(in.src[2 + rank])[lane]);
    mbarrier_at(m, copy.barrier);
    copy.step = m.bulk_step++;
    const u32 shared = u32(w.reg(in.src[0])[lane]);
    if (shared % 128)
      throw Violation{"target of a bulk copy that is not aligned to 128 bytes: " + hex(shared)};
    const Accessor by{m.bulk_agent(), copy.step, &w.seen};
    for_tile(map, shared, coordinates, [&](u32 place, u64 address, u32 size) {
      m.shared.launch(place, size, by);
      BulkPiece piece{place, size, {}};
      if (address)
        m.global.load(piece.data, address, size, m.block_index);
      copy.pieces.push_back(piece);
      copy.bytes += size;
    });
    m.bulk_copies.push_back(std::move(copy));
    m.counters.async_copies++;
  });
}
// One of the copies under way, drawn at random, lands.
inline bool complete_bulk_copy(Machine& m) {
  if (m.bulk_copies.empty())
    return false;
  const size_t which = m.random() % m.bulk_copies.size();
  const BulkCopy copy = std::move(m.bulk_copies[which]);
  m.bulk_copies.erase(m.bulk_copies.begin() + which);
  const Accessor by{m.bulk_agent(), copy.step, nullptr};
  for (const BulkPiece& piece : copy.pieces)
    m.shared.land(piece.data, piece.address, piece.size, by);
  const auto found = m.mbarriers.find(copy.barrier);
  if (found == m.mbarriers.end())
    throw Violation{"the mbarrier of a bulk copy was invalidated before the copy landed"};
  MBarrier& b = found->second;
  b.transactions -= copy.bytes;
  b.released[m.bulk_agent()] = std::max(b.released[m.bulk_agent()], copy.step);
  settle(b);
  return true;
}

// [map, {coordinates}], [shared]: shared memory is read until cp.async.bulk.wait_group.
template <int rank>
void store_tile(Machine& m, Warp& w, const Instruction& in, Mask mask) {
  for_lanes(mask, [&](int lane) {
    const TensorMap& map = tensor_map(m, w.reg(in.src[0])[lane]);
    s64 coordinates[rank];
    for (int d = 0; d < rank; d++)
      coordinates[d] = s32(w.reg(in.src[1 + d])[lane]);
    const Accessor by{m.bulk_agent(), m.bulk_step++, &w.seen};
    for_tile(map, u32(w.reg(in.src[1 + rank])[lane]), coordinates, [&](u32 place, u64 address, u32 size) {
      u8 data[16];
      m.shared.read(data, place, size, by);
      m.shared.require_fenced(place, size, w.fenced, int(m.warps.size()));
      if (address)
        m.global.store(data, address, size, m.block_index);
    });
    w.open_bulk_step = by.step;
  });
}
inline void commit_bulk(Machine&, Warp& w, const Instruction&, Mask) { w.bulk_groups.push_back(w.open_bulk_step); }
inline void wait_bulk(Machine& m, Warp& w, const Instruction& in, Mask) {
  while (w.bulk_groups.size() > w.reg(in.src[0])[0]) {
    u32& seen = w.seen[m.bulk_agent()];
    seen = std::max(seen, w.bulk_groups.front());
    w.bulk_groups.pop_front();
  }
}

// clang-format off
#define LOAD(rank) {"cp.async.bulk.tensor." #rank "d.shared.global.mbarrier::complete_tx::bytes " \
                    "cp.async.bulk.tensor." #rank "d.shared::cluster.global.mbarrier::complete_tx::bytes", load_tile<rank>}
#define STORE(rank) {"cp.async.bulk.tensor." #rank "d.global.shared.bulk_group", store_tile<rank>}
inline const Definition kBulk[] = {
  {"mbarrier.init.shared.b64", init_mbarrier},
  {"mbarrier.inval.shared.b64", drop_mbarrier},
  {"mbarrier.arrive.expect_tx.shared.b64", arrive_mbarrier<true, true>},
  {"mbarrier.expect_tx.shared.b64", arrive_mbarrier<true, false>},
  {"mbarrier.arrive.shared.b64", arrive_mbarrier<false, true>},
  {"mbarrier.try_wait.parity.shared.b64 mbarrier.test_wait.parity.shared.b64", try_mbarrier},
  LOAD(1), LOAD(2), LOAD(3), STORE(1), STORE(2), STORE(3),
  {"cp.async.bulk.commit_group", commit_bulk},
  {"cp.async.bulk.wait_group cp.async.bulk.wait_group.read", wait_bulk},
};
#undef LOAD
#undef STORE
// clang-format on

}  // namespace ptx
