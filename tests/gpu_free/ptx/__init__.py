# SPDX-License-Identifier: Apache-2.0
"""Executes, without a GPU, the PTX that Triton emits for one, and checks what a GPU would get wrong in silence.

``parse`` turns PTX into a table of instructions, ``core/`` (C++) executes it with checks and counters, ``machine``
joins the two, and ``launch`` runs any ``kernel[grid](...)`` through them.

Checked: races in shared memory between warps, and with asynchronous copies and wgmma, by happens-before clocks; reads
of shared memory that nobody wrote or that a copy not waited for fills; addresses out of bounds or in the gaps of a
strided tensor; stores to what is read-only; two blocks that touch what one of them stores; misaligned accesses;
divergent barriers.

Not modelled: weak ordering of memory, races between the lanes of one warp (they run in lockstep), blocks that run at
the same time, the error of approximate instructions and of the tensor cores' sums, and time.
"""
